"""The forgetting guard: what an adapter costs on a general set that it was not trained for. Trains and stores nothing."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from embedft.embedding.data import RetrievalSet, load_retrieval, of_pairs, reduce_to
from embedft.embedding.evaluate import compare_towers
from embedft.embedding.pairs import Example
from embedft.encode import EncodeSettings
from embedft.errors import BaseError
from embedft.recipe import GuardSection

EVERY = 8  # so many of the standard library's files are read: enough functions, in a fraction of a second


def forgetting(
    model: Any, folder: Path, settings: EncodeSettings, guard: GuardSection, *, data: RetrievalSet, side: str, metric: str, batch_size: int
) -> dict[str, Any]:
    """Base and adapter on `data`, the guard's general set. `held`: the fall is beyond the bound."""
    from embedft.training.statistics import paired_bootstrap

    results = compare_towers(model, folder, settings, data, side=side, batch_size=batch_size).results
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


def general_set(guard: GuardSection) -> RetrievalSet:
    """The given set, or first sentences of docstrings → short functions of Python's own library: the same on the same Python."""
    if guard.data != "pydocs":
        return reduce_to(load_retrieval(guard.data), queries=guard.queries, documents=guard.documents)
    return _pydocs(guard.queries)


@lru_cache(maxsize=1)
def _pydocs(queries: int) -> RetrievalSet:
    from embedft.installed import STDLIB, functions_in, read_source, source_files

    pairs: dict[str, str] = {}
    for path in source_files(STDLIB)[::EVERY]:
        for function in functions_in(read_source(path), package=STDLIB):
            if 20 <= len(function.summary) <= 120 and 60 <= len(function.code) <= 240 and function.code not in pairs.values():
                pairs.setdefault(function.summary, function.code)
    if len(pairs) < 20:
        raise BaseError("eval.guard: this Python has no sources to make a general set of: name one in eval.guard.data, or set it to null")
    chosen = sorted(pairs, key=lambda summary: hashlib.sha256(summary.encode()).hexdigest())[:queries]
    return of_pairs([Example(summary, pairs[summary]) for summary in chosen], extra_documents=())
