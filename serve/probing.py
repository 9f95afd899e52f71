"""An adapter's probes through the live engine: base, adapter, base again in one run, held against what the trainer recorded."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedft.adapters.probes import Probe, ProbeReport, compare, read_probes
from embedft.errors import AdapterInvalid, EngineFailed, ProbesFailed
from serve.engine import BASE, Engine
from serve.errors import EngineRejected

Outputs = list[NDArray[np.float32]]
PROBE_SECONDS = 300.0


async def probe(engine: Engine, adapter: str, folder: Path) -> ProbeReport:
    """Replay the probes of the adapter in `folder`, which the engine holds as `adapter`.

    Raises AdapterInvalid or ProbesFailed if they cannot be run.
    """
    recorded = read_probes(folder)
    ask = _vectors if engine.config.task == "embedding" else _log_probabilities
    try:
        base = await ask(engine, BASE, recorded.probes)
        adapted = await _of_adapter(ask, engine, adapter, recorded.probes)
        again = await ask(engine, BASE, recorded.probes)
    except EngineRejected as error:
        raise AdapterInvalid(adapter.partition("@")[0], f"the engine cannot run its probes: {error}") from None
    return compare(recorded, base=base, adapted=adapted, base_again=again)


Ask = Callable[[Engine, str, Sequence[Probe]], Awaitable[Outputs]]


async def _of_adapter(ask: Ask, engine: Engine, adapter: str, probes: Sequence[Probe]) -> Outputs:
    """The engine has just answered for its base: where it fails now, that is the adapter's doing."""
    try:
        return await ask(engine, adapter, probes)
    except EngineFailed as error:
        raise ProbesFailed(adapter.partition("@")[0], f"the engine fails at them: {error}") from None


async def _vectors(engine: Engine, model: str, probes: Sequence[Probe]) -> Outputs:
    return list(await engine.client.vectors(model, [probe.ids for probe in probes], timeout=PROBE_SECONDS))


async def _log_probabilities(engine: Engine, model: str, probes: Sequence[Probe]) -> Outputs:
    prompts = [[*probe.ids, *probe.continuation] for probe in probes]
    body = {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    answer: dict[str, Any] = await engine.client.call("/v1/completions", body, timeout=PROBE_SECONDS)
    rows = sorted(answer["choices"], key=lambda row: row["index"])
    return [_of_continuation(row.get("prompt_logprobs"), probe) for row, probe in zip(rows, probes, strict=True)]


def _of_continuation(found: list[dict[str, Any] | None] | None, probe: Probe) -> NDArray[np.float32]:
    """(continuation tokens,) log-probabilities out of vLLM's list of {token id: {"logprob": …}}, one a prompt token."""
    if not found or len(found) != len(probe.ids) + len(probe.continuation):
        raise EngineFailed("the engine gave no log-probabilities of the prompt: the probes cannot be run")
    scores: list[float] = []
    for token, entry in zip(probe.continuation, found[len(probe.ids) :], strict=True):
        if entry is None or str(token) not in entry:
            raise EngineFailed("the engine's log-probabilities lack a token of the prompt")
        scores.append(float(entry[str(token)]["logprob"]))
    return np.asarray(scores, dtype=np.float32)
