"""How well vectors, or BM25, find a query's relevant documents. Scores every query apart; knows no training.

nDCG: linear gains and the log2 discount (Järvelin and Kekäläinen 2002, as trec_eval computes it); MRR@10: Craswell 2009.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedft.embedding.data import RetrievalSet
from embedft.embedding.sided import SidedEncoder
from embedft.encode import Encoder, EncodeSettings, Progress
from embedft.ranks import fused
from embedft.vectors import unit
from embedft.words import bm25_of, content_words

METRICS = ("ndcg@10", "mrr@10", "hit@1", "hit@5", "hit@10", "recall@10")
DEPTH = 10
POOL = 100  # documents of each ranking that a fusion looks at
_DISCOUNTS = 1.0 / np.log2(np.arange(2, DEPTH + 2))


@dataclass(frozen=True)
class RetrievalResult:
    """`per_query[metric]` (queries,) in the order of `ids`; `metrics` are their means; `ranked` the ids of the best POOL documents."""

    ids: tuple[str, ...]
    metrics: Mapping[str, float]
    per_query: Mapping[str, NDArray[np.float64]]
    ranked: tuple[tuple[str, ...], ...]


def evaluate_retrieval(
    encoder: Encoder,
    data: RetrievalSet,
    *,
    batch_size: int = 64,
    documents: NDArray[np.float32] | None = None,
) -> RetrievalResult:
    """Rank all documents for each query by the vectors' inner product (cosine where they are not normalised).

    `documents`: their vectors, where they are known already.
    """
    queries = encoder.encode(list(data.queries.values()), input_type="query", batch_size=batch_size)
    if documents is None:
        documents = encoder.encode(list(data.documents.values()), input_type="document", batch_size=batch_size)
    return score(data, rank(queries, documents, list(data.documents)))


def rank(queries: NDArray[np.float32], documents: NDArray[np.float32], ids: Sequence[str]) -> list[list[str]]:
    """(q, d) and (n, d) vectors → for each query the ids of its POOL nearest documents by cosine, best first."""
    best: list[list[str]] = []
    documents = unit(documents)
    for start in range(0, len(queries), 256):
        scores = unit(queries[start : start + 256]) @ documents.T  # (256, n)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :POOL]
        best.extend([ids[int(column)] for column in row] for row in order)
    return best


def bm25_baseline(data: RetrievalSet) -> RetrievalResult:
    """BM25 as `bm25_of` has it."""
    ids = list(data.documents)
    ranked = bm25_top(list(data.queries.values()), list(data.documents.values()), depth=POOL)
    return score(data, [[ids[row] for row in rows] for rows in ranked])


def bm25_top(queries: Sequence[str], documents: Sequence[str], *, depth: int) -> list[list[int]]:
    """For each query the rows of its best documents, best first; none that shares no word with it."""
    index: Any = bm25_of(documents)
    if index is None:
        return [[] for _ in queries]
    asked = [content_words(query) for query in queries]
    found, scores = index.retrieve(asked, k=min(depth, len(documents)), show_progress=False)
    return [[int(row) for row, value in zip(rows, values, strict=True) if value > 0] for rows, values in zip(found, scores, strict=True)]


def fuse(data: RetrievalSet, *results: RetrievalResult) -> RetrievalResult:
    """Reciprocal rank fusion of several rankings of the same queries."""
    ranked: list[list[str]] = []
    for lists in zip(*(result.ranked for result in results), strict=True):
        sums = fused(lists)
        ranked.append(sorted(sums, key=lambda identifier: (-sums[identifier], identifier))[:POOL])
    return score(data, ranked)


def score(data: RetrievalSet, ranked: Sequence[Sequence[str]]) -> RetrievalResult:
    """`ranked[i]`: ids for the i-th query, best first, at most DEPTH of them counted."""
    rows = [_scores(data.relevant[query], list(best)[:DEPTH]) for query, best in zip(data.queries, ranked, strict=True)]
    per_query = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in METRICS}
    metrics = {name: float(values.mean()) for name, values in per_query.items()}
    return RetrievalResult(tuple(data.queries), metrics, per_query, tuple(tuple(best) for best in ranked))


def _scores(relevant: Mapping[str, int], best: Sequence[str]) -> dict[str, float]:
    gains = np.array([relevant.get(identifier, 0) for identifier in best], dtype=np.float64)
    ideal = np.sort(np.array(list(relevant.values()), dtype=np.float64))[::-1][:DEPTH]
    hits = np.flatnonzero(gains > 0)
    first = int(hits[0]) if len(hits) else DEPTH
    return {
        "ndcg@10": float(gains @ _DISCOUNTS[: len(gains)] / (ideal @ _DISCOUNTS[: len(ideal)])),
        "mrr@10": 1.0 / (first + 1) if first < DEPTH else 0.0,
        "hit@1": float(first < 1),
        "hit@5": float(first < 5),
        "hit@10": float(first < DEPTH),
        "recall@10": len(hits) / len(relevant),
    }


@dataclass(frozen=True)
class Towers:
    """`results`: base, bm25, adapter, and fused (adapter with bm25). `index`: what indexing the documents takes."""

    results: Mapping[str, RetrievalResult]
    index: Mapping[str, float | int | bool]


def compare_towers(
    model: Any,
    folder: Path,
    settings: EncodeSettings,
    data: RetrievalSet,
    *,
    side: str,
    batch_size: int,
    progress: Progress | None = None,
) -> Towers:
    """base, bm25 and adapter on the same queries, from one PEFT model: the base is the adapter switched off.

    The documents of a query-only adapter are the base's, so they are encoded once. `progress` is told (texts encoded, of how many).
    """
    alone, adapted = (SidedEncoder(model, folder, settings, side=which) for which in ("none", side))
    ids, queries, texts = list(data.documents), list(data.queries.values()), list(data.documents.values())
    done, whole = 0, 2 * len(queries) + (1 if side == "query" else 2) * len(texts)

    def told(of_these: int, these: int) -> None:
        nonlocal done
        if progress:
            progress(done + of_these, whole)
        done += these if of_these == these else 0

    alone.progress = adapted.progress = told
    base_queries = alone.encode(queries, input_type="query", batch_size=batch_size)
    began = time.perf_counter()
    base_documents = alone.encode(texts, input_type="document", batch_size=batch_size)
    seconds = time.perf_counter() - began
    adapted_queries = adapted.encode(queries, input_type="query", batch_size=batch_size)
    documents = base_documents if side == "query" else adapted.encode(texts, input_type="document", batch_size=batch_size)
    base, bm25 = score(data, rank(base_queries, base_documents, ids)), bm25_baseline(data)
    adapter = score(data, rank(adapted_queries, documents, ids))
    index = {"documents": len(ids), "seconds": round(seconds, 3), "bytes": int(documents.nbytes), "again": side != "query"}
    return Towers({"base": base, "bm25": bm25, "adapter": adapter, "fused": fuse(data, bm25, adapter)}, index)
