"""Record an adapter's effect on the probes, and replay it, in this process: on a freshly loaded base, from files alone."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.adapters.passport import Passport, ProbeRecord, base_said, read_passport
from embedft.adapters.probes import (
    PROBE_CONTINUATIONS,
    PROBE_TEXTS,
    Probe,
    ProbeReport,
    RecordedProbes,
    choose,
    compare,
    read_probes,
)
from embedft.base import BaseSpec, base_folder, compute_dtype, exact_dtype, load_model, source_folder
from embedft.encode import Encoder, EncodeSettings, TextPreparer
from embedft.errors import AdapterInvalid, BaseMismatch
from embedft.methods import load_adapter
from embedft.methods.prompts import is_prompted
from embedft.model_folder import Task, fingerprint, quantization_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Outputs = list[npt.NDArray[np.float32]]

VIRTUAL = "virtual tokens"
SURE = 0.75  # of what is allowed: an engine's error was seen to be 1.3 times what the same probes gave here


def candidates(folder: Path, tokenizer: Any, *, settings: EncodeSettings | None) -> list[Probe]:
    """Probes to choose from. A language model gets each text as a user's message where the base has a chat template,
    followed by two of the continuations."""
    if settings is not None:
        return [Probe(tuple(ids)) for ids in TextPreparer(folder, settings).prepare(PROBE_TEXTS).ids]
    probes: list[Probe] = []
    for number, text in enumerate(PROBE_TEXTS):
        for shift in (0, 3):
            continuation = PROBE_CONTINUATIONS[(number + shift) % len(PROBE_CONTINUATIONS)]
            probes.append(Probe(_asked(tokenizer, text), tuple(tokenizer(continuation, add_special_tokens=False)["input_ids"])))
    return probes


def _asked(tokenizer: Any, text: str) -> tuple[int, ...]:
    try:
        message = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except Exception:  # there is no template, or none that takes a single message
        return tuple(tokenizer(text)["input_ids"])
    return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def outputs(model: Any, probes: Sequence[Probe], *, folder: Path, settings: EncodeSettings | None) -> "Outputs":
    """One array a probe: its vector (with `settings`), or the log-probabilities of its continuation's tokens."""
    if settings is not None:
        return list(Encoder(model, folder, settings).encode_ids([probe.ids for probe in probes]))
    return _log_probabilities(model, probes)


def _log_probabilities(model: Any, probes: Sequence[Probe], *, batch: int = 16) -> "Outputs":
    import torch

    from embedft.encode import pad

    made: Outputs = []
    for start in range(0, len(probes), batch):
        chosen = probes[start : start + batch]
        ids, mask = (tensor.to(model.device) for tensor in pad([probe.ids + probe.continuation for probe in chosen]))
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits.float()  # (batch, length, vocabulary)
        for row, probe in enumerate(chosen):
            first, last = len(probe.ids), len(probe.ids) + len(probe.continuation)
            scores = logits[row, first - 1 : last - 1].log_softmax(-1)
            made.append(scores.gather(1, ids[row, first:last, None])[:, 0].cpu().numpy())
    return made


def record(
    folder: Path, *, base: Path, tokenizer: Any, task: Task, settings: EncodeSettings | None, name: str | None = None
) -> RecordedProbes:
    """The effect of the adapter in `folder`, loaded from its files onto a base loaded from its own. `name`: what errors call it.

    Raises AdapterInvalid if it changes nothing. A module type whose loss the probes would not notice is in `unnoticed`.
    """
    model: Any = load_model(base, task=task, dtype=exact_dtype())
    probes = candidates(base, tokenizer, settings=settings)
    before = outputs(model, probes, folder=base, settings=settings)
    model = load_adapter(model, folder, name=name)
    effects = _difference(outputs(model, probes, folder=base, settings=settings), before)
    if not any(effect.any() for effect in effects):
        raise AdapterInvalid(name or folder.name, "it changes nothing: it did not train (raise train.lr, or train for more steps)")
    without: dict[str, Outputs] = {}
    for kind in module_types(model):
        with dropped(model, kind):
            without[kind] = _difference(outputs(model, probes, folder=base, settings=settings), before)
    return choose(probes, before, effects, without)


def trained_base(passport: Passport, given: str | Path | None = None) -> Path:
    """The folder of the base that an adapter was trained on: as its passport names it, or `given`, quantized if it is not yet.

    Raises BaseMismatch where that holds other bytes.
    """
    named = passport.base
    source = BaseSpec(named.model, named.quantization, named.revision) if given is None else BaseSpec(str(given), named.quantization)
    found = source_folder(source)
    folder = found if quantization_of(found) != "none" else base_folder(source)  # one that is quantized already is what it is
    if fingerprint(folder) != named.fingerprint:
        raise BaseMismatch(
            passport.name, trained_on=named.said, serving=base_said(source.model, quantization_of(folder), fingerprint(folder))
        )
    return folder


def verify(folder: Path, *, base: str | Path | None = None) -> ProbeReport:
    """Load `trained_base` and adapter afresh; hold the effect against the recorded one, computed as exactly as it was.

    Raises BaseMismatch, and AdapterInvalid where the folder is damaged.
    """
    return _replayed(folder, base, exact_dtype())


def refused_here(folder: Path, *, base: str | Path | None = None) -> str | None:
    """Why this machine's engines may not serve an adapter that `verify` passes: they may compute less exactly. None: they will."""
    if compute_dtype() == exact_dtype():
        return None
    report = _replayed(folder, base, compute_dtype())
    return near_refusal(report) if report.passed else report.reason


def near_refusal(report: ProbeReport) -> str | None:
    """What is to be said of probes that passed here, but so narrowly that an engine, which rounds in its own way, may fail them."""
    if report.error <= SURE * report.tolerance:
        return None
    return (
        f"its effect differs here from the trainer's by {report.error:.3f} of its norm, where {report.tolerance:.3f} is allowed, and an "
        "engine's own rounding may bring it beyond: train it further, or compute in float32 (EMBEDFT_DTYPE)"
    )


def _replayed(folder: Path, base: str | Path | None, dtype: "torch.dtype") -> ProbeReport:
    passport, recorded = read_passport(folder), read_probes(folder)
    base_dir = trained_base(passport, base)
    settings = settings_of(passport) if passport.task == "embedding" else None
    model = load_model(base_dir, task=passport.task, dtype=dtype)
    plain, again = (outputs(model, recorded.probes, folder=base_dir, settings=settings) for _ in range(2))
    adapted = outputs(load_adapter(model, folder, name=passport.name), recorded.probes, folder=base_dir, settings=settings)
    return compare(recorded, base=plain, adapted=adapted, base_again=again)


def settings_of(passport: Passport) -> EncodeSettings:
    """How the vectors of an embedding adapter are made, as its passport says."""
    if passport.pooling is None:
        raise AdapterInvalid(passport.name, "its passport names no pooling: it is not an embedding adapter")
    return EncodeSettings(passport.pooling, bool(passport.normalize), passport.max_length, passport.prompts)


def unnoticed(recorded: RecordedProbes) -> list[str]:
    """Module types that could be dropped without the probes failing."""
    return [kind for kind, change in recorded.sensitivity.items() if change <= recorded.tolerance]


def as_record(recorded: RecordedProbes, task: Task) -> ProbeRecord:
    sensitivity = {kind: round(change, 4) for kind, change in recorded.sensitivity.items()}
    return ProbeRecord(kind=task, count=len(recorded.probes), tolerance=recorded.tolerance, sensitivity=sensitivity)


def module_types(model: Any) -> list[str]:
    """What of an adapter can be left out: module types, named by their path within a layer (`self_attn.q_proj`,
    `attention.output.dense`), or its virtual tokens."""
    return sorted({kind for kind, _ in _parts(model)})


@contextmanager
def dropped(model: Any, kind: str) -> Generator[None]:
    """The adapter without its part on one module type, inside the block: there the base alone answers."""
    parts = [part for name, part in _parts(model) if name == kind]
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part())
        yield


def _parts(model: Any) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Any]]]]:
    """(module type, how to switch it off) of each adapted layer, whatever the method is."""
    from peft.tuners.adaption_prompt.layer import AdaptedAttention
    from peft.tuners.tuners_utils import BaseTunerLayer

    if is_prompted(model):
        yield VIRTUAL, model.disable_adapter
        return
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield _type(name), partial(_set, module, "_disable_adapters", True)
        elif isinstance(module, AdaptedAttention):
            yield _type(name), partial(_zeroed, module.adaption_gate)


@contextmanager
def _set(module: Any, name: str, value: Any) -> Generator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _zeroed(parameter: Any) -> Generator[None]:
    import torch

    with torch.no_grad():
        kept = parameter.detach().clone()
        parameter.zero_()
        try:
            yield
        finally:
            parameter.copy_(kept)


def _type(module: str) -> str:
    parts = module.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def _difference(one: "Outputs", other: "Outputs") -> "Outputs":
    return [left - right for left, right in zip(one, other, strict=True)]
