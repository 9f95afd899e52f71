"""Which texts are nearly the same: MinHash finds candidates (Broder 1997), their exact Jaccard similarity decides. Knows no data format."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from embedft.words import words

BANDS, ROWS = 20, 4  # a pair of similarity 0.8 shares a band with probability 0.9999
_PRIME = np.uint64((1 << 31) - 1)


def shingles(text: str) -> frozenset[str]:
    """Words and pairs of neighbouring words."""
    found = words(text)
    return frozenset([*found, *(" ".join(pair) for pair in pairwise(found))])


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other) if one or other else 0.0


class NearIndex:
    """Texts that answer: which of you is at least `threshold` similar to this one?"""

    def __init__(self, texts: Sequence[str], *, threshold: float = 0.8, seed: int = 7) -> None:
        self.threshold = threshold
        generator = np.random.default_rng(seed)
        self._factors = generator.integers(1, int(_PRIME), size=(2, BANDS * ROWS), dtype=np.uint64)
        self._sets = [shingles(text) for text in texts]
        self._buckets: dict[tuple[int, bytes], list[int]] = {}
        for number, content in enumerate(self._sets):
            for key in self._keys(content):
                self._buckets.setdefault(key, []).append(number)

    def like(self, text: str) -> Iterator[tuple[int, float]]:
        """(number, similarity) of each text that is alike, the most similar first."""
        content = shingles(text)
        candidates = {number for key in self._keys(content) for number in self._buckets.get(key, ())}
        scored = [(number, jaccard(content, self._sets[number])) for number in candidates]
        yield from sorted((pair for pair in scored if pair[1] >= self.threshold), key=lambda pair: (-pair[1], pair[0]))

    def _keys(self, content: frozenset[str]) -> Iterator[tuple[int, bytes]]:
        if not content:
            return
        hashes = np.array([crc32(part.encode()) for part in sorted(content)], dtype=np.uint64) % _PRIME
        signature: NDArray[np.uint64] = ((hashes[:, None] * self._factors[0] + self._factors[1]) % _PRIME).min(axis=0)
        for band in range(BANDS):
            yield band, signature[band * ROWS : (band + 1) * ROWS].tobytes()
