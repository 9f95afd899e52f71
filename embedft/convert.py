"""Any adapter → plain LoRA, with a certificate of what that cost; merging into a base, combining several. Trains nothing.

The update of each layer, ΔW, is read off the loaded adapter. Its singular values say which rank an exact copy needs; below that
rank the truncated SVD is the nearest LoRA there is (Eckart and Young), and the adapter's own probes say whether it is near enough.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from embedft.adapters.card import CARD, model_card
from embedft.adapters.passport import CONFIG, PASSPORT, WEIGHTS, read_passport
from embedft.base import exact_dtype, load_model
from embedft.errors import AdapterInvalid, MethodUnsupported, ProbesFailed, UsageError
from embedft.methods import config_of, load_adapter, method_named, only_pairs
from embedft.methods.companion import padded
from embedft.methods.files import write_lora
from embedft.methods.starts import dequantized
from embedft.verify import trained_base, verify

if TYPE_CHECKING:
    from torch import Tensor

    Deltas = dict[str, Tensor]
    Pairs = dict[str, tuple[Tensor, Tensor]]

CERTIFICATE = "conversion.json"
MAX_RANK = 64  # an engine's rank limit is set when it starts; this is the server's default
EXACT = 1e-5  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class Certificate:
    """`exact_rank`: the largest rank that any layer needs; `rank`: the one used; `layers`: name → ‖ΔW − BA‖ / ‖ΔW‖ (Frobenius);
    `probes`: the relative error of the effect on the adapter's own probes, at most `tolerance`."""

    source: str
    method: str
    exact_rank: int
    rank: int
    error: float
    layers: dict[str, float]
    probes: float
    tolerance: float

    @property
    def exact(self) -> bool:
        return self.rank >= self.exact_rank


def convert(folder: Path, out: Path, *, name: str, base: Path | None = None, rank: int | None = None) -> Certificate:
    """Write the adapter of `folder` as plain LoRA to `out`, with passport, probes and certificate; `rank` None is the exact one.

    The exact rank is used up to MAX_RANK, unless another is asked for. Raises MethodUnsupported where the method has no LoRA
    form, BaseMismatch, and ProbesFailed where the copy does not do what the adapter does; then `out` is not to be used.
    """
    passport = read_passport(folder)
    method = method_named(passport.method)
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: expected a whole number of at least 1")
    if method.to_lora == "no":
        raise MethodUnsupported(method.name, where="as LoRA", why="it is no sum of low-rank updates: serve it by the peft engine")
    base_dir = trained_base(passport, base)
    only_pairs(config_of(folder, name=passport.name), passport.name)
    model = load_adapter(load_model(base_dir, task=passport.task, dtype=exact_dtype()), folder, name=passport.name)
    changes = deltas(model)
    config: Any = next(iter(cast("Any", model).peft_config.values()))
    exact = max((numerical_rank(delta) for delta in changes.values()), default=1)
    used = min(max(exact, 1), MAX_RANK) if rank is None else rank
    pairs = {layer: truncated(delta, used) for layer, delta in changes.items()}
    errors = {layer: _error(delta, pairs[layer]) for layer, delta in changes.items()}
    write_lora(out, padded(pairs), targets=_targets(config, pairs), base_name=config.base_model_name_or_path, task_type=config.task_type)
    _copy_rest(folder, out)
    width = next(iter(padded(pairs).values()))[0].shape[0]
    first = passport.metrics.get("converted", {"of": passport.name, "method": passport.method})  # whose figures the others are
    metrics = passport.metrics | {"converted": {**first, "rank": width, "exact_rank": exact}}
    note = {"name": name, "method": "lora", "r": width, "alpha": float(width), "probes": passport.probes, "metrics": metrics}
    made = passport.model_copy(update=note)
    made.write(out)
    (out / CARD).write_text(model_card(made), encoding="utf-8")
    report = verify(out, base=base_dir)
    certificate = Certificate(
        source=passport.name,
        method=passport.method,
        exact_rank=exact,
        rank=width,
        error=max(errors.values(), default=0.0),
        layers=errors,
        probes=report.error,
        tolerance=report.tolerance,
    )
    (out / CERTIFICATE).write_text(json.dumps(asdict(certificate), indent=1) + "\n", encoding="utf-8")
    if not report.passed:
        remedy = "give a higher --rank, or serve it by the peft engine" if width < exact else "serve it by the peft engine"
        raise ProbesFailed(name, f"at rank {width} of {exact} {report.reason}; {remedy}")
    return certificate


def deltas(model: Any) -> "Deltas":
    """Layer → ΔW (out, in), fp32, of the loaded adapter, whatever its method. MethodUnsupported where a layer's update is no matrix."""
    import torch

    found: Deltas = {}
    with torch.no_grad():
        for name, layer in _tuned(model):
            found[name] = _delta(layer)
    return found


def numerical_rank(delta: "Tensor") -> int:
    """Singular values above EXACT of the largest."""
    import torch

    values = torch.linalg.svdvals(delta)
    return int((values > EXACT * values[0]).sum()) if float(values[0]) > 0 else 0


def truncated(delta: "Tensor", rank: int) -> "tuple[Tensor, Tensor]":
    """(A (r, in), B (out, r)) with BA the nearest matrix of that rank to `delta`."""
    import torch

    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _tuned(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _delta(layer: Any) -> "Tensor":
    import torch

    kind = next((kind for kind in DELTAS if hasattr(layer, kind)), None)
    if kind is None or not isinstance(layer.get_base_layer(), torch.nn.Linear):
        raise MethodUnsupported(type(layer).__name__, where="as LoRA", why="its update of a layer is no low-rank matrix")
    delta = DELTAS[kind](layer).detach().float()
    base = layer.get_base_layer()
    return delta.reshape(base.out_features, base.in_features)


def _lora(layer: Any) -> "Tensor":
    import torch

    if "default" not in layer.lora_A:
        raise AdapterInvalid("default", "a layer of it is missing")
    if hasattr(layer, "lora_E") and "default" in layer.lora_E:  # AdaLoRA
        a = layer.lora_A["default"] * layer.lora_E["default"]
        return layer.lora_B["default"] @ a * (layer.scaling["default"] / (layer.ranknum["default"] + 1e-5))
    plain = layer.scaling["default"] * (layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float())
    if "default" not in layer.lora_magnitude_vector:
        return plain
    weight = dequantized(layer.get_base_layer())  # DoRA: m (W + BA) / ‖W + BA‖ − W
    moved = weight + plain
    scale = layer.lora_magnitude_vector["default"].weight.float() / torch.linalg.vector_norm(moved, dim=1)
    return scale[:, None] * moved - weight


def _vera(layer: Any) -> "Tensor":
    """Λ_b B Λ_d A, with the parts of the shared A and B that the layer uses."""
    base = layer.get_base_layer()
    a = layer.vera_A["default"][:, : base.in_features].float()
    b = layer.vera_B["default"][: base.out_features].float()
    return layer.vera_lambda_b["default"].float()[:, None] * (b @ (layer.vera_lambda_d["default"].float()[:, None] * a))


def _lycoris(layer: Any) -> "Tensor":
    return layer.get_delta_weight("default")


DELTAS: Mapping[str, Callable[[Any], "Tensor"]] = {
    "lora_A": _lora,
    "vera_lambda_b": _vera,
    "hada_w1_a": _lycoris,
    "lokr_w1": _lycoris,
}


def _error(delta: "Tensor", pair: "tuple[Tensor, Tensor]") -> float:
    size = float(delta.norm())
    return float((delta - pair[1] @ pair[0]).norm()) / size if size else 0.0


class _targets:
    """Exactly the layers that were adapted: as the adapter's config chooses them where it does so by suffixes alone, else by full names."""

    def __init__(self, config: Any, pairs: "Pairs") -> None:
        suffixes = config.target_modules
        chosen = isinstance(suffixes, set | list) and config.peft_type.value == "LORA" and config.layers_to_transform is None
        self.target_modules = suffixes if chosen else sorted(pairs)
        self.exclude_modules = config.exclude_modules if chosen else None


def _copy_rest(folder: Path, out: Path) -> None:
    """All but the weights and what speaks of them: tokenizer, probes, recipe, evaluation."""
    for path in folder.iterdir():
        if path.name in {WEIGHTS, CONFIG, CERTIFICATE, PASSPORT, CARD}:
            continue
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, out / path.name)
