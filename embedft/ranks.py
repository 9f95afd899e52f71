"""Reciprocal rank fusion: several rankings made one (Cormack, Clarke and Büttcher, SIGIR 2009)."""

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

K = 60  # theirs
Item = TypeVar("Item", bound=Hashable)


def reciprocal(rank: int) -> float:
    """What one ranking gives an item at `rank` (from 1)."""
    return 1.0 / (K + rank)


def fused(rankings: Iterable[Sequence[Item]]) -> dict[Item, float]:
    """Each item's sum over the rankings that it is in, the first seen first."""
    sums: dict[Item, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            sums[item] = sums.get(item, 0.0) + reciprocal(rank)
    return sums
