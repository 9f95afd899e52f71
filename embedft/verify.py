"""Record an adapter's probes, and replay them on a freshly loaded base. What an engine must reproduce is decided here, in process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.adapters.passport import Passport, read_passport
from embedft.adapters.probes import PROBE_CONTINUATIONS, PROBE_TEXTS, Probe, ProbeReport, RecordedProbes, choose, compare, read_probes
from embedft.base import BaseSpec, base_folder, describe, load_model
from embedft.encode import EncodeSettings, Encoder, TextPreparer
from embedft.errors import BaseMismatch
from embedft.methods import load_adapter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from peft import PeftModel

Outputs = list["NDArray[np.float32]"]
MAX_PROBE_TOKENS = 48


def settings_of(passport: Passport) -> EncodeSettings:
    """How the vectors of an embedding adapter are made."""
    assert passport.pooling is not None
    return EncodeSettings(
        pooling=passport.pooling, normalize=bool(passport.normalize), max_length=passport.max_length, prompts=passport.prompts, dimensions=None
    )


def embedding_probes(folder: Path, settings: EncodeSettings, *, side: str) -> tuple[Probe, ...]:
    """The fixed texts as token ids under the adapter's prompts: documents, or queries where only those are adapted."""
    prepared = TextPreparer(folder, settings).prepare(PROBE_TEXTS, "query" if side == "query" else "document")
    return tuple(Probe(tuple(ids[:MAX_PROBE_TOKENS])) for ids in prepared.ids)


def lm_probes(tokenizer: Any) -> tuple[Probe, ...]:
    """The fixed texts as prompts, each with one of the fixed continuations, as token ids."""
    probes: list[Probe] = []
    for index, text in enumerate(PROBE_TEXTS):
        continuation = PROBE_CONTINUATIONS[index % len(PROBE_CONTINUATIONS)]
        ids = tokenizer(text)["input_ids"][:MAX_PROBE_TOKENS]
        probes.append(Probe(tuple(ids), tuple(tokenizer(continuation, add_special_tokens=False)["input_ids"])))
    return tuple(probes)


def embedding_outputs(model: Any, folder: Path, settings: EncodeSettings, probes: Sequence[Probe]) -> Outputs:
    """One vector (dimensions,) a probe."""
    return list(Encoder(model, folder, settings).encode_ids([probe.ids for probe in probes]))


def lm_outputs(model: Any, probes: Sequence[Probe]) -> Outputs:
    """Log-probabilities (continuation tokens,) of each probe's continuation given its prompt, teacher-forced, float32."""
    import torch

    outputs: Outputs = []
    device = next(model.parameters()).device
    with torch.inference_mode():
        for probe in probes:
            ids = torch.tensor([probe.ids + probe.continuation], device=device)
            logits = model(input_ids=ids).logits[0, len(probe.ids) - 1 : -1].float()  # position i predicts token i + 1
            scores = torch.log_softmax(logits, dim=-1)
            outputs.append(scores.gather(1, ids[0, len(probe.ids) :, None])[:, 0].cpu().numpy())
    return outputs


def record(model: "PeftModel", probes: Sequence[Probe], run: Callable[[Any], Outputs]) -> RecordedProbes:
    """Run the candidates with the adapter, without it, and with each adapted module type dropped; keep the probes that show most."""
    with model.disable_adapter():
        base = run(model)
    effects = [one - other for one, other in zip(run(model), base, strict=True)]
    without: dict[str, Outputs] = {}
    for kind in _module_types(model):
        with _dropped(model, kind):
            without[kind] = [one - other for one, other in zip(run(model), base, strict=True)]
    return choose(probes, effects, without)


def record_folder(folder: Path, *, base: Path) -> RecordedProbes:
    """The probes of an adapter folder (with its passport), recorded on a freshly loaded base: what a server will load, not what trained."""
    passport = read_passport(folder)
    model = load_adapter(load_model(base, task=passport.task), folder)
    probes, run = _runner(passport, base)
    return record(model, probes, run)


def verify(folder: Path, *, base: Path | None = None) -> ProbeReport:
    """Replay an adapter's probes on a freshly loaded base (by default the one its passport names).

    Raises BaseMismatch where the base is not the one trained on, AdapterInvalid where the folder is damaged.
    """
    passport = read_passport(folder)
    recorded = read_probes(folder)
    where = base or base_folder(BaseSpec(passport.base.model, passport.base.quantization, passport.base.revision))
    found = describe(where).fingerprint
    if found != passport.base.fingerprint:
        raise BaseMismatch(passport.name, trained_on=passport.base.fingerprint, serving=found)
    model = load_adapter(load_model(where, task=passport.task), folder)
    _, run = _runner(passport, where, probes=recorded.probes)
    with model.disable_adapter():
        plain, again = run(model), run(model)
    return compare(recorded, base=plain, adapted=run(model), base_again=again)


def _runner(passport: Passport, base: Path, *, probes: Sequence[Probe] | None = None) -> tuple[Sequence[Probe], Callable[[Any], Outputs]]:
    if passport.task == "embedding":
        settings = settings_of(passport)
        chosen = probes or embedding_probes(base, settings, side=passport.side)
        return chosen, lambda model: embedding_outputs(model, base, settings, chosen)
    from transformers import AutoTokenizer

    chosen = probes or lm_probes(AutoTokenizer.from_pretrained(base))
    return chosen, lambda model: lm_outputs(model, chosen)


def _module_types(model: "PeftModel") -> list[str]:
    """Last names of the adapted modules: query, value, dense …"""
    return sorted({name.rpartition(".")[2] for name, _ in _tuned(model)})


def _tuned(model: "PeftModel") -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


@contextmanager
def _dropped(model: "PeftModel", kind: str) -> Iterator[None]:
    """The adapter without its modules of one type."""
    modules = [module for name, module in _tuned(model) if name.rpartition(".")[2] == kind]
    for module in modules:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in modules:
            module._disable_adapters = False
