"""Saving and loading adapters: safetensors + set_peft_model_state_dict on a PeftModel; other ways in this stack lose tensors."""

import json
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.adapters.passport import CONFIG, WEIGHTS
from embedft.errors import AdapterInvalid
from embedft.methods.companion import has_companion, plain_pairs
from embedft.methods.precision import settle
from embedft.methods.prompts import place_prompts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")  # PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA subtract what they start from
_STRANGE = ("layer_replication", "alora_invocation_tokens", "arrow_config", "use_bdlora", "use_qalora", "kasa_config", "monteclora_config")
_IDLE = frozenset({"merge_weights", "peft_version"})  # of another version of PEFT, and of no matter to what the layers compute
_WHOLE = ("modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters")


def save_weights(model: "PeftModel", folder: Path, *, base_name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors exactly as PEFT does; `base_name` is a hub id or a built-in's name.

    What trained with a frozen pair beside it, or at ranks that differ from layer to layer, becomes one plain LoRA.
    """
    adapted: Any = model
    config: Any = adapted.peft_config["default"]
    is_lora = config.peft_type.value == "LORA" and not config.use_dora
    if is_lora and (has_companion(model) or config.rank_pattern):
        pairs = plain_pairs(model)
        write_lora(folder, pairs, targets=config, base_name=base_name, task_type=config.task_type)
        return
    for each in adapted.peft_config.values():
        each.base_model_name_or_path = base_name
        if each.peft_type.value == "LORA" and each.init_lora_weights not in (True, False):
            each.init_lora_weights, each.eva_config = True, None  # how it began changes nothing that is served, and vLLM balks at it
    adapted.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; ours follows
    _put_in_order(folder, config)


def write_lora(folder: Path, pairs: "Mapping[str, tuple[Tensor, Tensor]]", *, targets: Any, base_name: str, task_type: Any) -> None:
    """A plain LoRA folder: layer → (A (r, in), B (out, r)), ΔW = B A. `targets` has target_modules and exclude_modules."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    rank = next(iter(pairs.values()))[0].shape[0]
    tensors: dict[str, Any] = {}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.float().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.float().cpu().contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets.target_modules,
        exclude_modules=targets.exclude_modules,
        task_type=task_type,
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    _put_in_order(folder, config)
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})


def _put_in_order(folder: Path, config: Any) -> None:
    """PEFT keeps modules' names as sets and writes them in another order in each process: sorted, one training is one generation."""
    path = folder / CONFIG
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content |= {key: sorted(value) for key, value in content.items() if isinstance(getattr(config, key, None), set)}
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def config_of(folder: Path, *, name: str | None = None) -> Any:
    """PEFT's config of an adapter whose update is the same wherever it is loaded, ready to load; `name`: what errors call it.

    AdapterInvalid where the base would have to be changed for it first, or where its layers compute what no engine here does.
    """
    from peft import PeftConfig

    called = name or folder.name
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise AdapterInvalid(called, f"its folder lacks {CONFIG} or {WEIGHTS}")
    config: Any = PeftConfig.from_pretrained(str(folder))
    start = getattr(config, "init_lora_weights", True)
    if not isinstance(start, bool) and start not in HARMLESS_INITS:
        raise AdapterInvalid(
            called,
            f"{start} starts from a changed base, which other adapters would see: convert it to LoRA where it was made (PEFT's "
            "save_pretrained with path_initial_model_for_weight_conversion)",
        )
    if strange := [option for option in _STRANGE if getattr(config, option, None)]:
        raise AdapterInvalid(called, f"its {CONFIG} sets {strange[0]}, with which its layers compute what no engine here does")
    if unknown := _unknown(folder, config):
        raise AdapterInvalid(
            called,
            f"its {CONFIG} sets {unknown}, which the PEFT here ({version('peft')}) does not know, so its layers may compute otherwise: "
            f"install the PEFT that wrote it, or take {unknown} out where it says nothing of the layers",
        )
    config.inference_mode = True
    if config.peft_type.value == "LORA":
        config.init_lora_weights = True  # drawn cheaply, then overwritten
    return config


def _unknown(folder: Path, config: Any) -> str | None:
    """The first setting of the file that PEFT leaves out and that switches something on. Numbers only measure what another switches on."""
    given: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    known = {field.name for field in fields(config)} | _IDLE
    on = (name for name, value in given.items() if value and value != "none" and (value is True or not isinstance(value, int | float)))
    return next((name for name in on if name not in known), None)


def only_pairs(config: Any, name: str) -> None:
    """AdapterInvalid where it changes more than linear layers, each by an update of its weights: that is no part of a LoRA made from it."""
    if getattr(config, "bias", "none") != "none":
        raise AdapterInvalid(name, f"it changes biases of the base too (bias: {config.bias}), which are no part of a LoRA")
    for option in _WHOLE:
        if given := getattr(config, option, None):
            said = ", ".join(map(str, given)) if isinstance(given, list | tuple | set | dict) else given
            raise AdapterInvalid(name, f"it changes more than weights of linear layers ({option}: {said}), which is no part of a LoRA")


def load_adapter(model: "PreTrainedModel", folder: Path, *, adapter_name: str = "default", name: str | None = None) -> "PeftModel":
    """`model` with the adapter of `folder` on it, in eval mode; `name`: what errors call it.

    AdapterInvalid as `config_of`, and where tensors are missing, unknown or misshapen.
    """
    from peft import get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    called = name or folder.name
    config = config_of(folder, name=called)
    config.base_model_name_or_path = model.name_or_path  # else PEFT warns that the recorded name differs from the folder's
    dtype = model.dtype
    peft_model: Any = get_peft_model(model, config, adapter_name=adapter_name)
    settle(peft_model, dtype)
    if config.is_prompt_learning:
        place_prompts(peft_model)
    _check_tensors(peft_model, folder, adapter_name, called)
    tensors = load_file(str(folder / WEIGHTS))
    outcome = set_peft_model_state_dict(peft_model, tensors, adapter_name=adapter_name)
    if not config.is_prompt_learning and outcome.unexpected_keys:
        raise AdapterInvalid(called, f"tensors that match nothing in the base: {', '.join(outcome.unexpected_keys[:3])}")
    peft_model.eval()
    peft_model.requires_grad_(False)
    return peft_model


def _check_tensors(model: "PeftModel", folder: Path, adapter_name: str, called: str) -> None:
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
                called, f"tensor {name}: the base expects {expected.get(name, 'none')}, the file has {found.get(name, 'none')}"
            )
