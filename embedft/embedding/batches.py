"""Which examples share a batch: in-batch negatives must be negatives, and rows of like length cost least. Knows no model."""

import random
from collections import deque
from collections.abc import Iterator, Sequence

from embedft.embedding.data import Examples

WINDOW = 16  # batches sorted by length together: more pads less and mixes less


class BatchPlan:
    """Batches of row indices for each epoch; the same seed and epoch give the same batches. A row of weight 2 comes twice an epoch.

    In a batch no query meets a second document that answers it, neither as a document nor as a negative, and no query
    or document occurs twice; a row that would break this waits for a later batch. `exclusive=False` lifts all that, for
    losses that compare no row with another row's document. `set_epoch` is what Trainers call.
    """

    def __init__(self, examples: Examples, *, batch: int, seed: int, exclusive: bool = True, window: int = WINDOW) -> None:
        """`window`: so many batches are sorted by length together; 1 where nothing is padded, so that batches mix freely."""
        self.batch_size = min(batch, len(examples))
        self.rows, self.window = len(examples), window
        self.seed, self.epoch = seed, 0
        self.drop_last = False
        numbers: dict[str, int] = {}
        for row in examples.rows:
            for text in (row.document, *row.negatives):
                numbers.setdefault(text, len(numbers))
        self._documents = [frozenset(numbers[text] for text in (row.document, *row.negatives)) for row in examples.rows]
        nothing: frozenset[int] = frozenset()
        answers = {query: frozenset(numbers[text] for text in texts) for query, texts in examples.relevant.items()}
        self._answers = [answers[row.query] if exclusive else nothing for row in examples.rows]
        self._lengths = [len(row.document) for row in examples.rows]
        self._weights: dict[float, list[int]] = {}
        for number, row in enumerate(examples.rows):
            self._weights.setdefault(row.weight, []).append(number)
        self.shown = len(self._shown(0))  # rows an epoch
        self.never = [weight for weight, rows in self._weights.items() if not _times(weight, len(rows))]  # weights that show no row
        first = self._plan(0)
        self._count, self.alone = len(first), self.shown - sum(map(len, first))  # `alone`: rows of an epoch that are in no batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.of_epoch(self.epoch)

    def of_epoch(self, epoch: int) -> list[list[int]]:
        """As many batches as `len` says: an order that fits worse gives fewer, and the first of them come twice."""
        batches = self._plan(epoch) or self._plan(0)
        return [batches[number % len(batches)] for number in range(self._count)]

    def _plan(self, epoch: int) -> list[list[int]]:
        """Full batches in random order, then those that the last rows fill only in part; a batch of one teaches nothing."""
        generator = random.Random(f"{self.seed}-{epoch}")
        order = self._shown(epoch)
        generator.shuffle(order)
        size = self.window * self.batch_size
        full: list[list[int]] = []
        waiting: list[int] = []
        stuck: list[int] = []  # where few documents answer many queries, more than are looked at again with every window
        for start in range(0, len(order), size):
            window = waiting + order[start : start + size]
            if self.window > 1:
                window.sort(key=lambda row: self._lengths[row])
            batches, left = self._fill(window)
            waiting, over = left[:size], left[size:]
            full += batches
            stuck += over
        rest = list(self._rest(stuck + waiting))
        if stuck:  # then most of them are there
            full, rest = full + rest, []
        generator.shuffle(full)
        return [batch for batch in full + rest if len(batch) > 1 or self.batch_size == 1]

    def _shown(self, epoch: int) -> list[int]:
        """The rows of one epoch: as often as their weight says; of a weight's fraction always as many, and those that come next: two
        epochs of a half show every row."""
        if set(self._weights) == {1.0}:
            return list(range(len(self._documents)))
        order: list[int] = []
        for weight, rows in self._weights.items():
            whole, part = divmod(_times(weight, len(rows)), len(rows))
            ring = random.Random(f"{self.seed}-{weight}").sample(rows, len(rows))
            order += rows * whole + [ring[place % len(ring)] for place in range(epoch * part, (epoch + 1) * part)]
        return order

    def _fill(self, rows: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """As many full batches as the rows give, in their order; the rows left over."""
        batches: list[list[int]] = []
        while len(rows) >= self.batch_size:
            batch, rows = self._take(rows)
            if len(batch) < self.batch_size:
                return batches, [*batch, *rows]
            batches.append(batch)
        return batches, list(rows)

    def _rest(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Batches of what is left, of each answer's rows one at a time: two of them share no batch anyway."""
        queues: dict[object, deque[int]] = {}
        for row in rows:
            queues.setdefault(self._answers[row] or row, deque()).append(row)
        while queues:
            batch, _ = self._take([queue[0] for queue in queues.values()])
            for row in batch:
                queues[self._answers[row] or row].popleft()
            yield batch
            queues = {key: queue for key, queue in queues.items() if queue}

    def _take(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """The first rows that may share a batch, and the others."""
        taken: list[int] = []  # positions
        documents: set[int] = set()
        answers: set[int] = set()
        for position, row in enumerate(rows):
            if len(taken) == self.batch_size:
                break
            if documents.isdisjoint(self._answers[row]) and answers.isdisjoint(self._documents[row]):
                taken.append(position)
                documents |= self._documents[row]
                answers |= self._answers[row]
        gone = set(taken)
        return [rows[position] for position in taken], [row for position, row in enumerate(rows) if position not in gone]


def _times(weight: float, rows: int) -> int:
    """So many rows of a set are shown in an epoch."""
    return int(weight) * rows + round((weight - int(weight)) * rows)
