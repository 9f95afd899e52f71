"""Which texts are nearly the same: exact Jaccard similarity of their words and word pairs. Knows no data format.

Texts that cannot be alike are not compared (Xiao et al. 2008, "Efficient similarity joins for near duplicate detection"): two sets that
are share one of their rarest parts, and enough parts behind it. So queries made by one template do not all meet each other.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil

import numpy as np
from numpy.typing import NDArray

from embedft.words import words

_SLACK = 1e-9  # of sums that are whole numbers but for their rounding


def shingles(text: str) -> frozenset[str]:
    """Words and pairs of neighbouring words."""
    found = words(text)
    return frozenset([*found, *(" ".join(pair) for pair in pairwise(found))])


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other) if one or other else 0.0


class NearIndex:
    """Texts that answer: which of you is at least `threshold` similar to this one?"""

    def __init__(self, texts: Sequence[str], *, threshold: float = 0.8) -> None:
        self.threshold = threshold
        self._sets = [shingles(text) for text in texts]
        self._counts = Counter(part for content in self._sets for part in content)
        held: dict[str, list[tuple[int, int]]] = {}
        for number, content in enumerate(self._sets):
            for place, part in enumerate(self._rarest(content)):
                held.setdefault(part, []).append((number, len(content) - place))
        self._held: dict[str, NDArray[np.int64]] = {part: np.array(rows) for part, rows in held.items()}
        self._sizes = np.array([len(content) for content in self._sets], dtype=np.int64)

    def like(self, text: str) -> Iterator[tuple[int, float]]:
        """(number, similarity) of each text that is alike, the most similar first."""
        content = shingles(text)
        scored = [(number, jaccard(content, self._sets[number])) for number in self._candidates(content)]
        yield from sorted((pair for pair in scored if pair[1] >= self.threshold), key=lambda pair: (-pair[1], pair[0]))

    def _candidates(self, content: frozenset[str]) -> set[int]:
        found: set[int] = set()
        for place, part in enumerate(self._rarest(content)):
            if (held := self._held.get(part)) is not None:
                numbers, behind = held.T
                wanted = self.threshold / (1 + self.threshold) * (len(content) + self._sizes[numbers])  # parts in both sets
                found.update(numbers[np.minimum(len(content) - place, behind) >= wanted - _SLACK].tolist())
        return found

    def _rarest(self, content: frozenset[str]) -> list[str]:
        """The rarest parts, one more than two sets that are alike may differ in."""
        ranked = sorted(content, key=lambda part: (self._counts[part], part))
        return ranked[: len(content) - ceil(self.threshold * len(content) - _SLACK) + 1]
