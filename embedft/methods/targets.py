"""Which layers of a base an adapter sits on. Knows no method but by the names of layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from embedft.errors import MethodUnsupported

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_KEYS_VALUES = frozenset({"k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "query_key_value", "qkv_proj", "c_attn"})
_SECOND_OF_MLP = frozenset({"down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2"})


def linear_modules(model: "nn.Module") -> list[str]:
    """Names of all linear layers, quantized ones too."""
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def fused_experts(model: "nn.Module") -> float:
    """Share of the weights that a mixture's experts hold outside of linear layers, where no adapter reaches them."""
    total = sum(value.numel() for value in model.parameters())
    return sum(value.numel() for name, value in model.named_parameters() if value.dim() == 3 and ".experts." in name) / max(total, 1)


def train_adapters_only(model: Any) -> None:
    """Training mode for the adapter's own layers: dropout in the frozen ones would add noise and switch fused attention off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.eval()
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for name, child in layer.named_children():  # pyright: ignore[reportAttributeAccessIssue]
                if name != "base_layer":
                    child.train()


def targeted_modules(model: "PreTrainedModel", targets: "Literal['all-linear'] | tuple[str, ...]") -> list[str]:
    """Full names of the linears to adapt. 'all-linear': those the output depends on, so neither a pooler nor the output embedding."""
    names = linear_modules(model)
    if targets == "all-linear":
        head = model.get_output_embeddings()
        found = [name for name in names if "pooler" not in name.split(".") and model.get_submodule(name) is not head]
        if not found:
            why = "it has no linear layers but the output's (GPT-2's are convolutions): train it by method=full, or take another base"
            raise MethodUnsupported("lora", where=f"on {type(model).__name__}", why=why)
        return found
    found = [name for name in names if any(name == target or name.endswith("." + target) for target in targets)]
    missing = [target for target in targets if not any(name == target or name.endswith("." + target) for name in names)]
    if missing:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise MethodUnsupported("lora", where=f"on {', '.join(missing)}", why=f"this base has no such linear layer; it has {known}")
    return found


def last_layers(model: "PreTrainedModel", names: list[str], layers: int | None) -> list[str]:
    """Those of `names` that lie in the last so many layers; all of them for None. A module outside the numbered layers stays out."""
    if layers is None:
        return names
    there = int(model.config.num_hidden_layers)
    if layers > there:
        raise MethodUnsupported("lora", where=f"on the last {layers} layers", why=f"this base has {there}: leave layers out for all")
    first = there - layers
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), -1) for name in names}
    return [name for name in names if numbers[name] >= max(first, 0)]


def rescaled_modules(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(layers, those among them whose input is scaled), as (IA)³ rescales keys, values and what enters an MLP's second layer."""
    inputs = [name for name in names if _second_of_mlp(name)]
    return [name for name in names if name in inputs or name.rpartition(".")[2] in _KEYS_VALUES] or list(names), inputs


def _second_of_mlp(name: str) -> bool:
    *_, before, last = ("", *name.split("."))
    return last in _SECOND_OF_MLP or (last == "dense" and before == "output" and ".attention." not in f".{name}")


def weighted_modules(model: "PreTrainedModel") -> list[str]:
    """All leaf layers with weights, a pooler's apart."""
    return [
        name
        for name, module in model.named_modules()
        if name and not any(module.children()) and any(True for _ in module.parameters(recurse=False)) and "pooler" not in name.split(".")
    ]
