"""How well vectors, or BM25, find a query's relevant documents. Scores every query apart; knows no training.

nDCG: linear gains and the log2 discount (Järvelin and Kekäläinen 2002, as trec_eval computes it); MRR@10: Craswell 2009.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedft.embedding.data import RetrievalSet
from embedft.encode import Encoder, EncodeSettings

if TYPE_CHECKING:
    from embedft.adapters.store import AdapterStore

METRICS = ("ndcg@10", "mrr@10", "hit@1", "hit@5", "hit@10", "recall@10")
DEPTH = 10
_DISCOUNTS = 1.0 / np.log2(np.arange(2, DEPTH + 2))


@dataclass(frozen=True)
class RetrievalResult:
    """`per_query[metric]` (queries,) in the order of `ids`; `metrics` are their means; `ranked` the ids of the best documents."""

    ids: tuple[str, ...]
    metrics: Mapping[str, float]
    per_query: Mapping[str, NDArray[np.float64]]
    ranked: tuple[tuple[str, ...], ...]


def evaluate_retrieval(
    encoder: Encoder,
    data: RetrievalSet,
    *,
    batch_size: int = 64,
    for_documents: AbstractContextManager[Any] | None = None,
) -> RetrievalResult:
    """Rank all documents for each query by the vectors' inner product (cosine where they are not normalised).

    `for_documents` is entered while the documents are encoded: a query-only adapter is switched off there.
    """
    queries = encoder.encode(list(data.queries.values()), input_type="query", batch_size=batch_size)
    with for_documents or nullcontext():
        documents = encoder.encode(list(data.documents.values()), input_type="document", batch_size=batch_size)
    return score(data, rank(queries, documents, list(data.documents)))


def rank(queries: NDArray[np.float32], documents: NDArray[np.float32], ids: Sequence[str]) -> list[list[str]]:
    """(q, d) and (n, d) vectors → for each query the ids of its DEPTH nearest documents by cosine, best first."""
    best: list[list[str]] = []
    documents = _unit(documents)
    for start in range(0, len(queries), 256):
        scores = _unit(queries[start : start + 256]) @ documents.T  # (256, n)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
        best.extend([ids[int(column)] for column in row] for row in order)
    return best


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def bm25_baseline(data: RetrievalSet) -> RetrievalResult:
    """BM25 (Robertson's, bm25s' defaults) over words split at underscores, English stop words left out."""
    ids = list(data.documents)
    ranked = bm25_top(list(data.queries.values()), list(data.documents.values()), depth=DEPTH)
    return score(data, [[ids[row] for row in rows] for rows in ranked])


def bm25_top(queries: Sequence[str], documents: Sequence[str], *, depth: int) -> list[list[int]]:
    """For each query the rows of its best documents, best first; none that shares no word with it."""
    import bm25s

    def words(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), token_pattern=r"(?u)[^\W_]+", stopwords="english", show_progress=False, return_ids=False)

    index: Any = bm25s.BM25()
    index.index(words(documents), show_progress=False)
    found, scores = index.retrieve(words(queries), k=min(depth, len(documents)), show_progress=False)
    return [[int(row) for row, value in zip(rows, values, strict=True) if value > 0] for rows, values in zip(found, scores, strict=True)]


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


def comparison(results: Mapping[str, RetrievalResult], *, metric: str, seed: int = 7) -> dict[str, Any]:
    """The metrics block of a passport: the figures of base, bm25 and adapter, and the 95 % interval of the adapter's gain in `metric`."""
    from embedft.training.statistics import paired_bootstrap

    base, adapter = results["base"], results["adapter"]
    low, high = paired_bootstrap(base.per_query[metric], adapter.per_query[metric], seed=seed)
    figures = {name: dict(results[name].metrics) for name in ("base", "bm25", "adapter")}
    return {"metric": metric, "queries": len(base.ids), **figures, "gain_ci95": [low, high]}


def compare_towers(
    model: Any, folder: Path, settings: EncodeSettings, data: RetrievalSet, *, side: str, batch_size: int
) -> dict[str, RetrievalResult]:
    """base, bm25 and adapter on the same queries, from one PEFT model: the base is the adapter switched off."""
    encoder = Encoder(model, folder, settings)
    off = model.disable_adapter() if side == "query" else None
    adapter = evaluate_retrieval(encoder, data, batch_size=batch_size, for_documents=off)
    with model.disable_adapter():
        base = evaluate_retrieval(encoder, data, batch_size=batch_size)
    return {"base": base, "bm25": bm25_baseline(data), "adapter": adapter}


def evaluate_adapter(
    name: str | Path,
    data: str,
    store: "AdapterStore",
    *,
    base: str | Path | None = None,
    metric: str = "ndcg@10",
    queries: int | None = None,
    documents: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Base, BM25 and a stored adapter (or an adapter folder) on other data: what `embedft eval` prints.

    `base` names the base's folder where the passport's name (a local folder's) does not lead to it.
    Raises DataError, AdapterNotFound, AdapterInvalid, BaseNotFound and BaseMismatch.
    """
    from embedft.adapters.passport import read_passport
    from embedft.base import load_model
    from embedft.embedding.data import load_retrieval, reduce_to
    from embedft.errors import AdapterInvalid
    from embedft.methods import load_adapter
    from embedft.verify import trained_base

    retrieval = reduce_to(load_retrieval(data), queries=queries, documents=documents)
    folder = Path(name) if Path(name).is_dir() else store.folder(str(name))
    passport = read_passport(folder)
    if passport.task != "embedding" or passport.pooling is None or passport.normalize is None:
        raise AdapterInvalid(passport.name, "it is no embedding adapter, so it ranks nothing")
    source = trained_base(passport, base)
    model = load_adapter(load_model(source, task="embedding"), folder)
    settings = EncodeSettings(passport.pooling, passport.normalize, passport.max_length, passport.prompts)
    results = compare_towers(model, source, settings, retrieval, side=passport.side, batch_size=batch_size)
    return comparison(results, metric=metric)
