"""Which base and which adapter a request means: `model`, `adapter` and `?adapter=` say it once, or say the same."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from embedft.errors import InputInvalid
from embedft.model_folder import Task
from serve.engine import Engine
from serve.errors import ModelNotFound
from serve.visible import Named, Visible

DOES = {"embedding": "embeds", "causal_lm": "generates", "cross_encoder": "reranks"}


@dataclass(frozen=True)
class Choice:
    """`adapter` None is the base itself."""

    engine: Engine
    adapter: str | None


def asked(request: Request, *, given: Named, is_set: bool) -> tuple[str | None, bool]:
    """(adapter, whether one was named at all) out of the body's `adapter` and the query string's. 400 where they differ."""
    in_query = _in_query(request) if request.scope["query_string"] else []
    if len(set(in_query)) > 1:
        raise InputInvalid("adapter_conflict", "?adapter= is there more than once", "adapter")
    if in_query and in_query[0] == "":
        raise InputInvalid("invalid_parameter", "?adapter= is empty: name an adapter or leave it out", "adapter")
    if in_query and is_set and given != in_query[0]:
        raise InputInvalid("adapter_conflict", f"the body says adapter {given!r}, the query string {in_query[0]!r}", "adapter")
    assert not isinstance(given, list)  # embeddings take lists apart themselves
    return (in_query[0], True) if in_query else (given, is_set)


def _in_query(request: Request) -> list[str]:
    """Every ?adapter=. InputInvalid for what is nearly one: the base would answer. Other parameters are for whoever put them there."""
    for name in request.query_params:
        if name != "adapter" and difflib.get_close_matches(name.lower(), ["adapter"], cutoff=0.75):
            raise InputInvalid("unknown_parameter", f"?{name[:80]}=: did you mean ?adapter=", name[:80])
    return request.query_params.getlist("adapter")


def choose_each(seen: Visible, adapters: Sequence[str | None], *, task: Task, model: str | None, is_set: bool) -> dict[str | None, Choice]:
    """One choice for each distinct name, in their order; all of one base. None beside an adapter is the base of that adapter."""
    made: dict[str | None, Choice] = {}
    for name in sorted(dict.fromkeys(adapters), key=lambda name: name is None):
        beside = next((choice.engine for choice in made.values()), None)
        made[name] = choose(seen, task=task, model=model, adapter=name, is_set=is_set, beside=beside)
    if len({choice.engine.name for choice in made.values()}) > 1:
        raise InputInvalid("adapter_conflict", "the adapters are of different bases: ask each base by itself", "adapter")
    return {name: made[name] for name in dict.fromkeys(adapters)}


def choose(seen: Visible, *, task: Task, model: str | None, adapter: str | None, is_set: bool, beside: Engine | None = None) -> Choice:
    """Resolve a request. `beside`: the base that is meant where nothing names another, if this tenant may ask it.

    Raises ModelNotFound, AdapterNotFound, or InputInvalid adapter_conflict, model_required, wrong_task.
    """
    base, by_model = _of_model(seen, model)
    if by_model is not None and is_set and adapter != by_model:
        raise InputInvalid(
            "adapter_conflict", f"model {model!r} names adapter {by_model!r}, `adapter` says {adapter!r}: say one", "adapter"
        )
    name = adapter if is_set else by_model
    if name is None:
        engine = base or (beside if beside and beside.name in seen.engines else _only(seen, task))
    else:
        engine = seen.get(name).engine
        if base is not None and base is not engine:
            raise InputInvalid("adapter_conflict", f"adapter {name!r} is on base {engine.name!r}, not on {base.name!r}", "adapter")
    if engine.config.task != task:
        raise InputInvalid("wrong_task", f"base {engine.name!r} only {DOES[engine.config.task]}: ask another base for this", "model")
    return Choice(engine, name)


def _of_model(seen: Visible, model: str | None) -> tuple[Engine | None, str | None]:
    """`model` as (base, adapter): a base's name, an adapter's name or `base:adapter`."""
    if model is None:
        return None, None
    if model in seen.engines:
        return seen.engines[model], None
    base, _, adapter = model.partition(":")
    if base in seen.engines:
        return seen.engines[base], adapter
    if seen.knows(model):
        return None, model
    raise ModelNotFound(model, [*seen.engines, *seen.live, *seen.aliases], unserved=seen.why_unserved(model))


def _only(seen: Visible, task: Task) -> Engine:
    fitting = [engine for engine in seen.engines.values() if engine.config.task == task]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise InputInvalid("wrong_task", f"no base here {DOES[task]}: there are {', '.join(seen.engines)}", "model")
    raise InputInvalid("model_required", f"name a `model`: there are {', '.join(engine.name for engine in fitting)}", "model")
