"""METHODS: one row per PEFT method, with what it can do; attaching, saving and loading an adapter. Knows no data and no training loop.

Loading is ours (safetensors + set_peft_model_state_dict on a PeftModel): other ways in this stack lose or re-initialise tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from embedft.adapters.passport import CONFIG, WEIGHTS
from embedft.base import Base
from embedft.errors import AdapterInvalid, MethodUnsupported
from embedft.model_folder import Task
from embedft.recipe import AdapterSection

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Method:
    """One PEFT method. Engines ask for a capability and never for a name.

    mixed_batch: several adapters in one forward pass; vllm: vLLM's LoRA kernels serve it as it is;
    to_lora: how it turns into plain LoRA; neutral_start: attaching it changes no output before training.
    """

    name: str
    config: str
    paper: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    mixed_batch: bool = True
    vllm: bool = True
    to_lora: Literal["is", "exact", "approximate", "no"] = "is"
    neutral_start: bool = True
    quantizations: tuple[str, ...] = ("none", "nf4", "int8")


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        row.name: row
        for row in (
            Method("lora", "LoraConfig", "arXiv 2106.09685"),
            Method("rslora", "LoraConfig", "arXiv 2312.03732", options=MappingProxyType({"use_rslora": True})),
        )
    }
)


def method_named(name: str) -> Method:
    """The row called `name`; MethodUnsupported lists what there is."""
    if name not in METHODS:
        raise MethodUnsupported(name, where="here", why=f"the methods are {', '.join(METHODS)}")
    return METHODS[name]


def attach(base: Base, adapter: AdapterSection, *, task: Task) -> "PeftModel":
    """A new adapter on the frozen base. Only the adapter's parameters train; they are fp32. Draws from torch's global RNG."""
    import peft

    method = method_named(adapter.method)
    if base.info.quantization not in method.quantizations:
        raise MethodUnsupported(
            method.name, where=f"on a base in {base.info.quantization}", why=f"it trains on {', '.join(method.quantizations)}"
        )
    modules = last_layers(base.model, targeted_modules(base.model, adapter.targets), getattr(adapter, "layers", None))
    suffixes = sorted({name.rpartition(".")[2] for name in modules}) if adapter.targets == "all-linear" else list(adapter.targets)
    excluded = sorted(name for name in linear_modules(base.model) if name not in modules and any(name.endswith(s) for s in suffixes))
    config = getattr(peft, method.config)(
        r=adapter.r,
        lora_alpha=adapter.scale_alpha,
        lora_dropout=adapter.dropout,
        target_modules=suffixes,
        exclude_modules=excluded or None,
        task_type="CAUSAL_LM" if task == "causal_lm" else "FEATURE_EXTRACTION",
        **method.options,
    )
    return peft.get_peft_model(base.model, config)  # pyright: ignore[reportReturnType]


def linear_modules(model: "nn.Module") -> list[str]:
    """Names of all linear layers, quantized ones too."""
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def targeted_modules(model: "PreTrainedModel", targets: "Literal['all-linear'] | tuple[str, ...]") -> list[str]:
    """Full names of the linears to adapt. 'all-linear': those the output depends on, so neither a pooler nor the output embedding."""
    names = linear_modules(model)
    if targets == "all-linear":
        head = model.get_output_embeddings()
        return [name for name in names if "pooler" not in name.split(".") and model.get_submodule(name) is not head]
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
    first = int(model.config.num_hidden_layers) - layers
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), -1) for name in names}
    return [name for name in names if numbers[name] >= max(first, 0)]


def save_weights(model: "PeftModel", folder: Path, *, base_name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors exactly as PEFT does; `base_name` is a hub id or a built-in's name."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; ours follows


def load_adapter(model: "PreTrainedModel", folder: Path, *, adapter_name: str = "default") -> "PeftModel":
    """`model` with the adapter of `folder` on it, in eval mode. AdapterInvalid where tensors are missing, unknown or misshapen."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise AdapterInvalid(folder.name, f"its folder lacks {CONFIG} or {WEIGHTS}")
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    config.base_model_name_or_path = model.name_or_path  # else PEFT warns that the recorded name differs from the folder's
    peft_model: Any = get_peft_model(model, config, adapter_name=adapter_name)
    _check_tensors(peft_model, folder, adapter_name)
    tensors = load_file(str(folder / WEIGHTS))
    outcome = set_peft_model_state_dict(peft_model, tensors, adapter_name=adapter_name)
    if outcome.unexpected_keys:
        raise AdapterInvalid(folder.name, f"tensors that match nothing in the base: {', '.join(outcome.unexpected_keys[:3])}")
    peft_model.eval()
    peft_model.requires_grad_(False)
    return peft_model


def _check_tensors(model: "PeftModel", folder: Path, adapter_name: str) -> None:
    """Names and shapes of the file are those that this base expects of the adapter: none missing, none more."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    expected = {
        name: tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False).items()
    }
    with safe_open(str(folder / WEIGHTS), framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            raise AdapterInvalid(
                folder.name, f"tensor {name}: the base expects {expected.get(name, 'none')}, the file has {found.get(name, 'none')}"
            )
