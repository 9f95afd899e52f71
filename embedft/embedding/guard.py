"""The forgetting guard: what an adapter costs on a general set that it was not trained for. Trains and stores nothing."""

import hashlib
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from embedft.embedding.data import RetrievalSet, load_retrieval, of_pairs, reduce_to, without_queries
from embedft.embedding.evaluate import compare_towers
from embedft.embedding.pairs import Example
from embedft.encode import EncodeSettings, Progress
from embedft.errors import BaseError, DataError
from embedft.recipe import GuardSection

LEAST = 20  # queries of the standard library: of fewer a mean says nothing
EVERY = 8  # so many of the standard library's files are read: enough functions, in a fraction of a second


def forgetting(
    model: Any,
    folder: Path,
    settings: EncodeSettings,
    guard: GuardSection,
    *,
    data: RetrievalSet,
    side: str,
    metric: str,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Base and adapter on `data`, the guard's general set. `held`: the fall is beyond the bound. `progress`: as in `compare_towers`."""
    from embedft.training.statistics import paired_bootstrap

    results = compare_towers(model, folder, settings, data, side=side, batch_size=batch_size, progress=progress).results
    base, adapter = (results[name].per_query[metric] for name in ("base", "adapter"))
    return {
        "data": guard.data if guard.data == "pydocs" else Path(guard.data).name,
        "metric": metric,
        "queries": len(base),
        "base": float(base.mean()),
        "adapter": float(adapter.mean()),
        "change_ci95": list(paired_bootstrap(base, adapter)),
        "bound": guard.drop,
        "held": bool(base.mean() - adapter.mean() > guard.drop),
    }


def general_set(guard: GuardSection, *, trained: Collection[str] = ()) -> RetrievalSet:
    """The given set, or first sentences of docstrings → short functions of Python's own library: the same on the same Python.

    Without the queries that are `trained` on: what is learned by heart shows nothing of what is forgotten. Raises DataError, BaseError.
    """
    if guard.data != "pydocs":
        given = load_retrieval(guard.data)
        kept = without_queries(given, trained)
        if not kept.queries:
            raise DataError([f"eval.guard.data: all of its {len(given.queries)} queries are trained on; name another, or eval.guard=null"])
        if kept is not given:
            from embedft.training.progress import note

            known = len(given.queries) - len(kept.queries)
            note(f"eval.guard.data: {known} of its {len(given.queries)} queries are trained on, and left out")
        return reduce_to(kept, queries=guard.queries, documents=guard.documents)
    pairs = _pydocs()
    unknown = [summary for summary in pairs if summary not in trained]
    if len(unknown) < LEAST:
        why = "has no sources to make a general set of" if len(pairs) < LEAST else "has no other functions than those that are trained on"
        raise BaseError(f"eval.guard: this Python {why}: name a set in eval.guard.data, or set it to null")
    chosen = sorted(unknown, key=lambda summary: hashlib.sha256(summary.encode()).hexdigest())[: guard.queries]
    return of_pairs([Example(summary, pairs[summary]) for summary in chosen], extra_documents=())


@lru_cache(maxsize=1)
def _pydocs() -> Mapping[str, str]:
    """First sentence → short function."""
    from embedft.installed import STDLIB, functions_in, read_source, source_files

    pairs: dict[str, str] = {}
    for path in source_files(STDLIB)[::EVERY]:
        for function in functions_in(read_source(path), package=STDLIB):
            if 20 <= len(function.summary) <= 120 and 60 <= len(function.code) <= 240 and function.code not in pairs.values():
                pairs.setdefault(function.summary, function.code)
    return pairs
