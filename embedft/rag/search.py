"""A question → chunks, in stages that can each be left out: dense vectors, BM25, their fusion, reranking. Knows no engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from embedft.errors import EngineFailed, UsageError
from embedft.rag.engines import Labelled
from embedft.rag.index import Found, VectorIndex
from embedft.ranks import fused

Scores = Sequence[tuple[int, float]]  # (row, score), best first
Rerank = Callable[[str, Sequence[str]], Sequence[float]]  # (question, chunks' whole texts) → a score for each


@dataclass(frozen=True)
class Stages:
    """`fusion` none: dense only; sparse: BM25 only; rrf: reciprocal ranks (Cormack et al. 2009); weights: `weight` × dense + rest × BM25,
    each scaled to 0 … 1. `depth`: how many each stage hands on; the best `rerank_depth` are reranked. `mapped`: use a fitted linear map."""

    k: int = 5
    fusion: Literal["none", "sparse", "rrf", "weights"] = "none"
    weight: float = 0.5
    depth: int = 50
    rerank: Rerank | None = None
    rerank_depth: int = 20
    mapped: bool = False


def search(index: VectorIndex, question: str, vector: Labelled | None, stages: Stages) -> list[Found]:
    """The `k` best chunks for `question`. `vector` may be None where only BM25 is asked for.

    Raises LineageMismatch, IndexInvalid; UsageError where BM25 is asked for and the index has none.
    """
    index = index.snapshot()  # the rows of every stage are of one state
    depth = max(stages.k, stages.rerank_depth if stages.rerank else 0, stages.depth if stages.fusion in ("rrf", "weights") else 0)
    dense: Scores = []
    if stages.fusion != "sparse":
        if vector is None:
            raise UsageError("dense search needs the question's vector")
        dense = index.nearest(index.accept(vector, mapped=stages.mapped), depth)
    scored = dense
    if stages.fusion != "none":
        scored = _fused(dense, index.by_words(question, depth), stages)
    found = index.found(scored[:depth])
    if stages.rerank and found:
        found = _reranked(found, question, stages.rerank, stages.rerank_depth)
    return found[: stages.k]


def _fused(dense: Scores, sparse: Scores, stages: Stages) -> Scores:
    if stages.fusion == "sparse":
        return sparse
    return rrf([dense, sparse]) if stages.fusion == "rrf" else weighted(dense, sparse, stages.weight)


def rrf(lists: Sequence[Scores]) -> Scores:
    """Reciprocal rank fusion."""
    total = fused([row for row, _ in scored] for scored in lists)
    return sorted(total.items(), key=lambda pair: -pair[1])


def weighted(dense: Scores, sparse: Scores, weight: float) -> Scores:
    """weight × dense + (1 − weight) × sparse, each scaled to 0 … 1 over its own list; a row missing from a list has 0 there."""
    total: dict[int, float] = {}
    for share, scored in ((weight, dense), (1.0 - weight, sparse)):
        values = [score for _, score in scored]
        low, high = (min(values), max(values)) if values else (0.0, 0.0)
        for row, score in scored:
            total[row] = total.get(row, 0.0) + share * ((score - low) / (high - low) if high > low else 1.0)
    return sorted(total.items(), key=lambda pair: -pair[1])


def fit_weight(training: Sequence[tuple[Scores, Scores, set[int]]]) -> tuple[float, float]:
    """(dense list, sparse list, relevant rows) of each training query → (weight, its mean reciprocal rank at 10), over a grid of 0.05."""
    if not training:
        raise UsageError("a weight is fitted on training queries: give at least one")
    best = (0.5, -1.0)
    for weight in np.round(np.arange(0.0, 1.0001, 0.05), 2):
        ranks = [_reciprocal(weighted(dense, sparse, float(weight)), relevant) for dense, sparse, relevant in training]
        if (mean := float(np.mean(ranks))) > best[1] + 1e-12:
            best = (float(weight), mean)
    return best


def _reciprocal(scored: Scores, relevant: set[int]) -> float:
    return next((1.0 / rank for rank, (row, _) in enumerate(scored[:10], start=1) if row in relevant), 0.0)


def _reranked(found: list[Found], question: str, rerank: Rerank, depth: int) -> list[Found]:
    head, rest = found[:depth], found[depth:]
    scores = list(rerank(question, [hit.chunk.whole for hit in head]))
    if len(scores) != len(head):
        raise EngineFailed(f"the reranker gave {len(scores)} scores for {len(head)} texts")
    order = sorted(range(len(head)), key=lambda place: -scores[place])
    return [replace(head[place], score=float(scores[place])) for place in order] + rest
