"""Probes: fixed inputs and the adapter's effect on them as the trainer saw it. Whoever loads the adapter replays them. Loads no model.

The effect is Δ = adapter − base, both from one engine in one run: vectors for an embedding adapter, log-probabilities of given
continuations for a language model's. A cosine of whole vectors would not do: a dropped module can hide behind it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedft.errors import AdapterInvalid

PROBES = "probes.safetensors"
TOLERANCE = 0.1  # the most that the relative error of the effect may be
SIGNAL = 5.0  # the effect's norm must exceed this many times the engine's repeat noise
KEPT = 8
FLOOR = 0.02  # no tolerance below this: engines' rounding must pass
ANOTHER = 0.3  # a base whose answers differ by more than this part of their norm is computed otherwise, whatever its rounding
ROUNDING = 2.0  # and none below this many times what the engine's base differs by from the trainer's, up to TOLERANCE: bf16 must pass

PROBE_TEXTS = (
    "Return the number of items in a list, or zero when it is empty.",
    "How do I install the package without administrator rights?",
    "def area(radius): return 3.14159 * radius ** 2",
    "The committee met on Tuesday and put off its decision until spring.",
    "Raises ValueError if the two arrays differ in shape.",
    "symptoms of iron deficiency in adults",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)",
    "She closed the window, for the rain had begun again.",
    "net revenue grew by twelve percent over the prior fiscal year",
    "Configuration",
    "Play something quiet for the evening.",
    "for key, value in sorted(table.items()): print(key, value)",
    "What is the capital of the northern province?",
    "Compute the inverse of a square matrix by Gaussian elimination.",
    "Licence: you may copy and change this work if you keep this notice.",
    "My card has not arrived yet; when can I expect it?",
    "import os\nfor name in os.listdir(folder): os.remove(name)",
    "The old lighthouse keeper counted the ships as they went by.",
    "Convert a date and time to seconds since the epoch.",
    "gate voltage of a thin film transistor at low temperature",
    "Book a table for four at seven in the evening.",
    "Parse the header, then read the body line by line until the end.",
    "If the file does not exist it is created; otherwise it is replaced.",
    "three small boats, one red, lay upside down upon the shingle",
)
PROBE_CONTINUATIONS = (
    " The answer is",
    " numpy",
    " item, count=None",
    " returns a new list of the same length.",
    " He did not reply at once.",
    "\nreturn value",
)


@dataclass(frozen=True)
class Probe:
    """Token ids of one input; for a language model also those of the continuation whose log-probabilities are asked for."""

    ids: tuple[int, ...]
    continuation: tuple[int, ...] = ()


@dataclass(frozen=True)
class RecordedProbes:
    """`effect[i]` is Δ of probe i: (dimensions,) for embeddings, (continuation tokens,) for a language model; float32.

    `base[i]`: what the base itself answers, of the same shape; empty where it was not recorded.
    """

    probes: tuple[Probe, ...]
    base: tuple[NDArray[np.float32], ...]
    effect: tuple[NDArray[np.float32], ...]
    sensitivity: Mapping[str, float]
    tolerance: float

    @property
    def strength(self) -> float:
        """‖Δ‖ over all probes."""
        return _norm(self.effect)


@dataclass(frozen=True)
class ProbeReport:
    """`error` = ‖Δ_engine − Δ_trainer‖ / ‖Δ_trainer‖; `signal` = ‖Δ_engine‖; `noise` = ‖base − base again‖."""

    error: float
    signal: float
    noise: float
    tolerance: float
    passed: bool
    reason: str


def choose(
    probes: Sequence[Probe],
    base: Sequence[NDArray[np.float32]],
    effects: Sequence[NDArray[np.float32]],
    without: Mapping[str, Sequence[NDArray[np.float32]]],
    *,
    keep: int = KEPT,
) -> RecordedProbes:
    """The `keep` probes that show the loss of any one module type best.

    `base[i]` is the base's answer to probe i, `effects[i]` its Δ, and `without[type][i]` Δ with that module type dropped. A probe is
    ranked by its least relative change over the types; the tolerance is half the least change that remains, between FLOOR and
    TOLERANCE.
    """
    losses = {kind: [effect - other for effect, other in zip(effects, dropped, strict=True)] for kind, dropped in without.items()}
    scores = [min((_norm([lost[i]]) for lost in losses.values()), default=1.0) / (_norm([effects[i]]) + 1e-9) for i in range(len(probes))]
    best = sorted(range(len(probes)), key=lambda i: -scores[i])[:keep]
    total = _norm([effects[i] for i in best])
    sensitivity = {kind: _norm([lost[i] for i in best]) / (total + 1e-9) for kind, lost in losses.items()}
    tolerance = max(FLOOR, min(TOLERANCE, 0.5 * min(sensitivity.values(), default=1.0)))
    plain, effect = (tuple(side[i] for i in best) for side in (base, effects))
    return RecordedProbes(tuple(probes[i] for i in best), plain, effect, sensitivity, tolerance)


def compare(
    recorded: RecordedProbes,
    *,
    base: Sequence[NDArray[np.float32]],
    adapted: Sequence[NDArray[np.float32]],
    base_again: Sequence[NDArray[np.float32]],
    tolerance: float | None = None,
) -> ProbeReport:
    """Hold an engine's outputs on the probes (one array a probe, base twice) against the trainer's effect.

    `tolerance` None: the recorded one, or twice what this engine's base differs by where that is more (it computes in bf16, and
    the trainer's was exact), but never more than TOLERANCE.
    """
    limit = recorded.tolerance if tolerance is None else tolerance
    shapes = [array.shape for array in recorded.effect]
    if any([array.shape for array in side] != shapes for side in (base, adapted, base_again)):
        return ProbeReport(float("inf"), 0.0, 0.0, limit, False, "the engine's outputs have another shape than the recorded ones")
    strength = recorded.strength + 1e-12
    differs = _norm([one - other for one, other in zip(base, recorded.base, strict=True)]) if recorded.base else 0.0
    rounding = differs / strength
    if tolerance is None:
        limit = max(limit, min(TOLERANCE, ROUNDING * rounding))
    effect = [one - other for one, other in zip(adapted, base, strict=True)]
    noise = _norm([one - other for one, other in zip(base_again, base, strict=True)])
    signal = _norm(effect)
    error = _norm([one - other for one, other in zip(effect, recorded.effect, strict=True)]) / strength
    if not np.isfinite([error, signal, noise]).all():
        return ProbeReport(error, signal, noise, limit, False, "the engine's outputs are not finite")
    if differs > ANOTHER * _norm(recorded.base):
        share = differs / (_norm(recorded.base) + 1e-12)
        reason = f"this engine computes another base than the trainer: without any adapter its answers differ by {share:.2f} of their norm"
        return ProbeReport(error, signal, noise, limit, False, f"{reason}; serve it by another engine")
    if signal <= SIGNAL * noise:
        return ProbeReport(error, signal, noise, limit, False, "it changes nothing: its effect drowns in the engine's repeat noise")
    if error > limit:
        reason = f"its effect differs from the trainer's by {error:.3f} of its norm, where {limit:.3f} is allowed"
        if ROUNDING * rounding > recorded.tolerance:
            reason += f" (the base alone rounds here by {rounding:.3f} of it): train it further, or compute in float32 (EMBEDFT_DTYPE)"
        return ProbeReport(error, signal, noise, limit, False, reason)
    return ProbeReport(error, signal, noise, limit, True, f"its effect differs from the trainer's by {error:.4f} of its norm")


def write_probes(folder: Path, recorded: RecordedProbes) -> None:
    """probes.safetensors: the effects and token ids end to end, with their lengths."""
    from safetensors.numpy import save_file

    def flat(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        return np.asarray([value for row in rows for value in row], dtype=np.int64)

    save_file(
        {
            "effect": np.concatenate(recorded.effect).astype(np.float32),
            "base": np.concatenate(recorded.base or [np.zeros(0)]).astype(np.float32),
            "effect_lengths": np.asarray([len(array) for array in recorded.effect], dtype=np.int64),
            "ids": flat([probe.ids for probe in recorded.probes]),
            "id_lengths": np.asarray([len(probe.ids) for probe in recorded.probes], dtype=np.int64),
            "continuations": flat([probe.continuation for probe in recorded.probes]),
            "continuation_lengths": np.asarray([len(probe.continuation) for probe in recorded.probes], dtype=np.int64),
        },
        str(folder / PROBES),
        metadata={"tolerance": repr(recorded.tolerance)},
    )


def read_probes(folder: Path) -> RecordedProbes:
    """The probes of an adapter folder. AdapterInvalid where they are absent or malformed."""
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    path = folder / PROBES
    if not path.is_file():
        raise AdapterInvalid(folder.name, f"it holds no {PROBES}, so what it does cannot be checked")
    try:
        arrays = load_file(str(path))
        with safe_open(str(path), framework="np") as file:
            tolerance = float((file.metadata() or {})["tolerance"])
        ids = _split(arrays["ids"], arrays["id_lengths"])
        continuations = _split(arrays["continuations"], arrays["continuation_lengths"])
        effect = _split(arrays["effect"], arrays["effect_lengths"])
        base = _split(arrays["base"], arrays["effect_lengths"]) if "base" in arrays and len(arrays["base"]) else []
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise AdapterInvalid(folder.name, f"its {PROBES} is malformed: {error}") from None
    probes = tuple(Probe(tuple(a.tolist()), tuple(b.tolist())) for a, b in zip(ids, continuations, strict=True))
    if (
        not probes
        or not len(probes) == len(effect) <= 64
        or any(len(probe.ids) > 4096 for probe in probes)
        or not 0 < tolerance <= TOLERANCE
    ):
        raise AdapterInvalid(folder.name, f"its {PROBES} is malformed: {len(probes)} probes, tolerance {tolerance}")
    return RecordedProbes(probes, tuple(base), tuple(effect), {}, tolerance)


def _split(flat: NDArray[Any], lengths: NDArray[Any]) -> list[NDArray[Any]]:
    bounds = np.cumsum(lengths.astype(np.int64))
    if len(bounds) and bounds[-1] != len(flat):
        raise ValueError("lengths that do not add up")
    return np.split(flat, bounds[:-1])


def _norm(arrays: Sequence[NDArray[np.float32]]) -> float:
    return float(np.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays)))
