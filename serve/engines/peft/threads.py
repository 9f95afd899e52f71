"""How many threads a pass of the model takes on a CPU: one, or all. Measured as it runs; knows no model.

All have to be woken for every product, and of few tokens one is done before that: a step of one sequence on seed-lm takes 1.7 ms
with one thread and 3 with two, while 64 short texts through MiniLM take 66 and 41.
"""

import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from statistics import median

TRIED = 3  # passes of a size by either number before one of them is preferred: the first compiles its products
AGAIN = 50  # then every so many, the other has a turn: what else this machine does may have changed
KEPT = 5  # passes that are remembered


class Threads:
    """For one thread that runs the model. `most`: 1 leaves nothing to choose, as on a GPU."""

    def __init__(self, most: int) -> None:
        self._numbers = (1, most) if most > 1 else (1,)
        self._sizes: dict[tuple[str, int], _Size] = {}

    @contextmanager
    def of(self, kind: str, tokens: int) -> Generator[None]:
        """A pass of `tokens` tokens inside the block, with as many threads as were fastest for passes of its kind and about its size."""
        if len(self._numbers) == 1:
            yield
            return
        import torch

        size = self._sizes.setdefault((kind, tokens.bit_length()), _Size(self._numbers))
        number = size.next()
        torch.set_num_threads(number)
        began = time.perf_counter()
        yield
        size.seconds[number].append((time.perf_counter() - began) / tokens)


class _Size:
    """What passes of one kind and size took, in seconds a token by the number of threads."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self.seconds: dict[int, deque[float]] = {number: deque(maxlen=KEPT) for number in numbers}
        self._passes = 0

    def next(self) -> int:
        """The number of threads that the next one takes."""
        self._passes += 1
        fewest = min(self.seconds, key=lambda number: len(self.seconds[number]))
        if len(self.seconds[fewest]) < TRIED:
            return fewest
        fastest, *others = sorted(self.seconds, key=lambda number: median(self.seconds[number]))
        return others[0] if self._passes % AGAIN == 0 else fastest
