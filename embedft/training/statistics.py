"""How sure a measured gain is. Plain numpy; knows no models."""

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating]
FEWEST = 6  # pairs that can prove anything at 5 %: by a sign test five that agree cannot either (2 · 2⁻⁵ = 6 %)


def paired_bootstrap(base: Scores, adapted: Scores, *, resamples: int = 2000, seed: int = 7) -> tuple[float, float]:
    """95 % percentile interval of mean(adapted − base), resampling the queries (Efron and Tibshirani 1993, ch. 13).

    Of fewer than FEWEST pairs it always reaches zero: resampling knows no other values than theirs, of one pair none but its own.

    base, adapted: (n,) scores of the same queries in the same order. Raises ValueError if shapes differ or n is 0.
    """
    if base.shape != adapted.shape or base.ndim != 1 or not len(base):
        raise ValueError(f"expected two equally long, non-empty vectors, got {base.shape} and {adapted.shape}")
    difference = np.asarray(adapted, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    generator = np.random.default_rng(seed)
    size, means = len(difference), np.empty(resamples)
    chunk = max(1, 4_000_000 // size)  # bounds the index matrix to 32 MB
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        means[start : start + rows] = difference[generator.integers(size, size=(rows, size))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    if size < FEWEST:
        low, high = min(low, 0.0), max(high, 0.0)
    return float(low), float(high)
