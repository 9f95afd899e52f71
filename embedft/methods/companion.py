"""A frozen low-rank pair beside the trainable one in every adapted layer: output += B_f A_f x, without a write to the base.

With it a start that would edit the base (W − s B₀A₀), a restart that would merge (W + s B A), and an update that would write
W at every step all run over the frozen base, and are published as one plain LoRA: [A; A_f], [s B, B_f], scale 1.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Pairs = Mapping[str, tuple[Tensor, Tensor]]  # layer → (A (r, in), B (out, r))

TRAINED, FROZEN = "default", "frozen"


def lora_layers(model: Any, adapter: str = TRAINED) -> Iterator[tuple[str, Any]]:
    """(name in the base, PEFT's LoRA layer) of each adapted layer."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield name, module


def pair(layer: Any, adapter: str = TRAINED) -> "tuple[Tensor, Tensor]":
    """(A, s B) of one layer: their product is the layer's ΔW."""
    import torch

    with torch.no_grad():
        return layer.lora_A[adapter].weight.detach().clone(), layer.scaling[adapter] * layer.lora_B[adapter].weight.detach()


def set_companion(model: Any, pairs: "Pairs") -> None:
    """Let each layer's frozen pair be (A_f, B_f), instead of what it was."""
    import torch

    rank = max(a.shape[0] for a, _ in pairs.values())
    if FROZEN not in model.peft_config or model.peft_config[FROZEN].r != rank:
        add_companion(model, rank)
    with torch.no_grad():
        for name, layer in lora_layers(model, FROZEN):
            layer.lora_A[FROZEN].weight.copy_(pairs[name][0])
            layer.lora_B[FROZEN].weight.copy_(pairs[name][1])


def add_companion(model: Any, rank: int) -> None:
    """A frozen pair of that rank that does nothing yet; both are active, only the first trains."""
    if FROZEN in model.peft_config:
        model.delete_adapter(FROZEN)
    given = model.peft_config[TRAINED]
    plain = {"init_lora_weights": True, "use_rslora": False, "lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter(FROZEN, replace(given, r=rank, lora_alpha=rank, inference_mode=True, **plain))
    model.base_model.set_adapter([TRAINED, FROZEN], inference_mode=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def drop_companion(model: Any) -> None:
    """Only the trained pair is left."""
    if FROZEN in model.peft_config:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.delete_adapter(FROZEN)
        model.base_model.set_adapter([TRAINED])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)


def has_companion(model: Any) -> bool:
    return FROZEN in model.peft_config


def plain_pairs(model: Any) -> "dict[str, tuple[Tensor, Tensor]]":
    """Layer → (A, B) of one rank, with ΔW = B A the sum of trained and frozen pair. Pairs that share an A become one."""
    import torch

    pairs: dict[str, tuple[Any, Any]] = {}
    frozen = {name: pair(layer, FROZEN) for name, layer in lora_layers(model, FROZEN)} if has_companion(model) else {}
    for name, layer in lora_layers(model):
        a, b = pair(layer)
        if name in frozen:
            other_a, other_b = frozen[name]
            if torch.equal(other_a[: len(a)], a):  # Delta-LoRA: rank 2 r, not 3 r
                a, b = other_a, torch.cat([other_b[:, : len(a)] + b, other_b[:, len(a) :]], dim=1)
            else:
                a, b = torch.cat([a, other_a]), torch.cat([b, other_b], dim=1)
        pairs[name] = a, b
    return padded(pairs)


def padded(pairs: "Mapping[str, tuple[Tensor, Tensor]]") -> "dict[str, tuple[Tensor, Tensor]]":
    """All pairs at the largest rank among them, the rest zeros: engines read one rank from the config."""
    from torch.nn.functional import pad

    rank = max((a.shape[0] for a, _ in pairs.values()), default=1)
    return {
        name: (pad(a, (0, 0, 0, rank - a.shape[0])), pad(b, (0, rank - b.shape[1]))) if a.shape[0] < rank else (a, b)
        for name, (a, b) in pairs.items()
    }
