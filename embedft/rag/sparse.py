"""BM25 over the chunks' texts, kept on disk beside the vectors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedft.words import bm25_of, content_words


class Bm25:
    """`rows[i]` is the row number of the i-th text."""

    def __init__(self, index: Any, rows: NDArray[np.int64]) -> None:
        self._index, self._rows = index, rows

    @classmethod
    def build(cls, texts: Iterator[tuple[int, str]]) -> "Bm25 | None":
        """Of (row, text) pairs; None where no text has a word."""
        rows, contents = list[int](), list[str]()
        for row, text in texts:
            rows.append(row)
            contents.append(text)
        index = bm25_of(contents)
        return cls(index, np.array(rows, dtype=np.int64)) if index is not None else None

    def search(self, text: str, k: int) -> list[tuple[int, float]]:
        """(row, score) of the k best with a score above 0, best first."""
        known = [word for word in content_words(text) if word in self._index.vocab_dict]
        if not known:
            return []
        scores: NDArray[np.float32] = self._index.get_scores(known)
        found = np.flatnonzero(scores > 0)
        if len(found) > k:  # bm25s' own retrieve sorts out all texts, ten times as slowly
            found = found[np.argpartition(-scores[found], k)[:k]]
        best = found[np.argsort(-scores[found], kind="stable")]
        return [(int(self._rows[place]), float(scores[place])) for place in best]

    def save(self, folder: Path) -> None:
        self._index.save(str(folder), show_progress=False)
        np.save(folder / "rows.npy", self._rows)

    @classmethod
    def load(cls, folder: Path) -> "Bm25":
        import bm25s

        return cls(bm25s.BM25.load(str(folder), mmap=True), np.load(folder / "rows.npy", mmap_mode="r"))
