"""What an evaluation claims and how sure it is: paired intervals, strata by lexical overlap, one adapter against another."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embedft.embedding.data import RetrievalSet
from embedft.embedding.evaluate import DEPTH, RetrievalResult, Towers, compare_towers
from embedft.words import content_words, words

if TYPE_CHECKING:
    from embedft.adapters.passport import Passport
    from embedft.adapters.store import AdapterStore
    from embedft.encode import Progress

SIDES = ("base", "bm25", "adapter", "fused")
STRATA = (("low", 0.0, 1 / 3), ("middle", 1 / 3, 2 / 3), ("high", 2 / 3, 1.01))  # bounds of the overlap, fixed so that runs compare


def comparison(towers: Towers, data: RetrievalSet, *, metric: str, seed: int = 7) -> dict[str, Any]:
    """The metrics block of a passport: the figures of every side, and 95 % intervals of the differences in `metric`.

    `gain_ci95` is the adapter's gain over the base; `intervals` holds that, the gain over BM25 and the base's over BM25.
    """
    from embedft.training.statistics import paired_bootstrap

    results = towers.results
    scores = {name: result.per_query[metric] for name, result in results.items()}
    pairs = (("adapter", "base"), ("adapter", "bm25"), ("base", "bm25"), ("fused", "bm25"))
    intervals = {f"{one} - {other}": list(paired_bootstrap(scores[other], scores[one], seed=seed)) for one, other in pairs}
    return {
        "metric": metric,
        "queries": len(results["base"].ids),
        **{name: dict(results[name].metrics) for name in SIDES},
        "gain_ci95": intervals["adapter - base"],
        "intervals": intervals,
        "strata": _strata(scores, overlaps(data), seed=seed),
        "index": dict(towers.index),
    }


def overlaps(data: RetrievalSet) -> NDArray[np.float64]:
    """(queries,) share of a query's distinct words that stand in its relevant document that shares most of them; stop words left out."""
    said: dict[str, frozenset[str]] = {}
    shares: list[float] = []
    for identifier, query in data.queries.items():
        asked = frozenset(content_words(query) or words(query))
        best = 0.0
        for document in data.relevant[identifier]:
            found = said.setdefault(document, frozenset(words(data.documents[document])))
            best = max(best, len(asked & found) / max(len(asked), 1))
        shares.append(best)
    return np.array(shares)


def _strata(scores: Mapping[str, NDArray[np.float64]], shares: NDArray[np.float64], *, seed: int) -> dict[str, Any]:
    """What each side scores where queries share few, some or most words with their documents. Empty strata are left out."""
    from embedft.training.statistics import paired_bootstrap

    found: dict[str, Any] = {}
    for name, low, high in STRATA:
        rows = (shares >= low) & (shares < high)
        if rows.any():
            means = {side: float(values[rows].mean()) for side, values in scores.items()}
            interval = paired_bootstrap(scores["base"][rows], scores["adapter"][rows], seed=seed)
            found[name] = {"queries": int(rows.sum()), **means, "gain_ci95": list(interval)}
    return found


def per_query(results: Mapping[str, RetrievalResult], texts: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """What eval/ keeps of each query: its id, the scores of every side, the adapter's ranking; the text only if asked."""
    rows: list[dict[str, Any]] = []
    for index, identifier in enumerate(results["base"].ids):
        row: dict[str, Any] = {"id": identifier}
        for name, result in results.items():
            row[name] = {metric: round(float(values[index]), 6) for metric, values in result.per_query.items()}
        row["ranked"] = list(results["adapter"].ranked[index][:DEPTH])
        rows.append(row if texts is None else row | {"texts": {"query": texts[identifier]}})
    return rows


def evaluate_adapter(
    name: str | Path,
    data: str,
    store: "AdapterStore",
    *,
    base: str | Path | None = None,
    metric: str | None = None,
    queries: int | None = None,
    documents: int | None = None,
    batch_size: int = 64,
    against: str | None = None,
    mteb: bool = False,
    progress: "Progress | None" = None,
) -> dict[str, Any]:
    """Base, BM25 and a stored adapter (or an adapter folder) on other data: what `embedft eval` prints.

    `base` names the base's folder where the passport's name (a local folder's) does not lead to it. `against`: another adapter, on the
    same queries: a query-only adapter's price against one that moves documents too. `mteb`: MTEB's own evaluator scores them as well.
    `metric`: what the intervals are of (default: what the adapter was trained by). `progress` is told of texts encoded. Raises DataError,
    AdapterNotFound, AdapterInvalid, BaseNotFound and BaseMismatch.
    """
    from embedft.embedding.data import load_retrieval, reduce_to
    from embedft.embedding.sets import of_run
    from embedft.embedding.through_mteb import expect_mteb, through_mteb
    from embedft.training.progress import note
    from embedft.training.statistics import paired_bootstrap

    if against is not None:
        ranking_adapter(against, store)  # its faults are told before the time that an evaluation takes
    if mteb:
        expect_mteb()
    run = of_run(data, *ranking_adapter(name, store))
    own = run[1].judged if run and run[0].data.eval is None else None
    retrieval = reduce_to(own or load_retrieval(data), queries=queries, documents=documents)
    model, folder, passport = open_adapter(name, store, base=base)
    if own:
        said = f"it was trained on the rest of {Path(data).name}: only the {len(own.queries)} queries that were kept back are asked"
        note(f"{passport.name}: {said}")
    elif run:
        note(f"{passport.name}: it was trained on {Path(data).name}: this shows what it learnt, and not how it ranks for other queries")
    settings, metric = _settings(passport), metric or str(passport.metrics.get("metric", "ndcg@10"))
    towers = compare_towers(model, folder, settings, retrieval, side=passport.side, batch_size=batch_size, progress=progress)
    report = comparison(towers, retrieval, metric=metric) | {"side": passport.side}
    if mteb:
        report["mteb"] = through_mteb(model, folder, settings, retrieval, side=passport.side, batch_size=batch_size)
    if against is not None:
        model, folder, other = open_adapter(against, store, base=base)
        found = compare_towers(model, folder, _settings(other), retrieval, side=other.side, batch_size=batch_size, progress=progress)
        theirs = found.results["adapter"]
        interval = paired_bootstrap(theirs.per_query[metric], towers.results["adapter"].per_query[metric])
        report["against"] = {"name": against, "side": other.side, **theirs.metrics, "difference_ci95": list(interval)}
    return report


def open_adapter(name: str | Path, store: "AdapterStore", *, base: str | Path | None = None) -> "tuple[Any, Path, Passport]":
    """An embedding adapter on the base that it was trained on: the model, the base's folder, the passport."""
    from embedft.base import load_model
    from embedft.methods import load_adapter
    from embedft.verify import trained_base

    folder, passport = ranking_adapter(name, store)
    source = trained_base(passport, base)
    return load_adapter(load_model(source, task="embedding"), folder, name=passport.name), source, passport


def ranking_adapter(name: str | Path, store: "AdapterStore") -> "tuple[Path, Passport]":
    """An embedding adapter's folder and passport. AdapterNotFound, AdapterInvalid."""
    from embedft.adapters.passport import read_passport
    from embedft.adapters.store import adapter_folder
    from embedft.errors import AdapterInvalid

    folder = adapter_folder(name, store)
    passport = read_passport(folder, name=str(name))
    if passport.task != "embedding" or passport.pooling is None or passport.normalize is None:
        raise AdapterInvalid(passport.name, "it is no embedding adapter, so it ranks nothing")
    return folder, passport


def _settings(passport: "Passport") -> Any:
    from embedft.verify import settings_of

    return settings_of(passport)
