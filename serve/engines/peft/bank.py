"""One base in memory and the adapters on it. Called by one thread only; knows no request."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.adapters.passport import CONFIG, WEIGHTS
from embedft.errors import AdapterExists, AdapterInvalid, AdapterNotFound

if TYPE_CHECKING:
    from embedft.base import Base

HARMLESS_INITS = ("gaussian", "eva", "orthogonal")  # PiSSA, OLoRA, LoftQ and CorDA subtract what they start from
BASE = "__base__"  # PEFT's name, in `adapter_names`, for a row without an adapter


class AdapterBank:
    """`model` is the base itself while no adapter is loaded, else the PeftModel around it."""

    def __init__(self, base: "Base") -> None:
        self.base = base
        self.model: Any = base.model
        self._slots: dict[str, str] = {}  # adapter's name → its name inside PEFT, where a dot is not allowed
        self._next = 0

    @property
    def names(self) -> list[str]:
        return list(self._slots)

    def load(self, name: str, folder: Path) -> None:
        """Put the adapter of `folder` on the base. All or nothing. Raises AdapterExists, AdapterInvalid."""
        self.put(name, *read(name, folder))

    def put(self, name: str, config: Any, tensors: dict[str, Any]) -> None:
        """The same with what `read` gave, which any thread may call."""
        if name in self._slots:
            raise AdapterExists(f"adapter {name!r} is already loaded: unload it first, or load it under another name")
        config.base_model_name_or_path = self.base.model.name_or_path  # else PEFT warns that it differs
        slot = f"a{self._next}"
        self._next += 1
        try:
            self._attach(slot, config)
            self._fill(slot, name, tensors)
        except Exception as error:
            self._detach(slot)
            if isinstance(error, AdapterInvalid):
                raise
            raise AdapterInvalid(name, str(error).splitlines()[0][:300]) from error
        self._slots[name] = slot

    def unload(self, name: str) -> None:
        """Take it off and free its tensors. Raises AdapterNotFound."""
        if name not in self._slots:
            raise AdapterNotFound(name, self.names)
        self._detach(self._slots.pop(name))

    def rows(self, names: Sequence[str | None]) -> dict[str, Any]:
        """What to pass to `model` so that row i runs with adapter names[i], None being the base. Raises AdapterNotFound."""
        for name in names:
            if name is not None and name not in self._slots:
                raise AdapterNotFound(name, self.names)
        if not self._slots:
            return {}
        return {"adapter_names": [BASE if name is None else self._slots[name] for name in names]}

    def _attach(self, slot: str, config: Any) -> None:
        from peft import get_peft_model

        if self.model is self.base.model:
            self.model = get_peft_model(self.base.model, config, adapter_name=slot)
        else:
            self.model.add_adapter(slot, config)
        self.model.eval()
        self.model.requires_grad_(False)

    def _fill(self, slot: str, name: str, tensors: dict[str, Any]) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        wanted = get_peft_model_state_dict(self.model, adapter_name=slot, save_embedding_layers=False)
        for key in sorted(set(wanted) | set(tensors)):
            shapes = [tuple(found[key].shape) if key in found else "none" for found in (wanted, tensors)]
            if shapes[0] != shapes[1]:
                raise AdapterInvalid(name, f"tensor {key}: the base expects {shapes[0]}, the file has {shapes[1]}")
        set_peft_model_state_dict(self.model, tensors, adapter_name=slot)

    def _detach(self, slot: str) -> None:
        if self.model is self.base.model or slot not in self.model.peft_config:
            return
        if len(self.model.peft_config) > 1:
            self.model.delete_adapter(slot)
            return
        self.model.unload()  # the last one: the base's own layers come back
        self.model = self.base.model


def read(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """PEFT's config and tensors out of `folder`. AdapterInvalid where this engine cannot do what they ask for."""
    from peft import LoraConfig, PeftConfig
    from safetensors.torch import load_file

    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise AdapterInvalid(name, f"its folder lacks {CONFIG} or {WEIGHTS}")
    config: Any = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or config.use_dora or config.modules_to_save or config.layer_replication:
        raise AdapterInvalid(name, "this engine mixes plain LoRA adapters: no DoRA, no modules_to_save; convert it to LoRA first")
    if config.bias != "none" or config.trainable_token_indices:
        raise AdapterInvalid(name, "it changes biases or token embeddings of the base, which all other rows would see")
    if not isinstance(config.init_lora_weights, bool) and config.init_lora_weights not in HARMLESS_INITS:
        raise AdapterInvalid(name, f"{config.init_lora_weights} starts from a changed base, which other rows would see: convert it to LoRA")
    config.inference_mode = True
    config.init_lora_weights = True  # drawn cheaply, then overwritten; PiSSA and its like would rewrite base tensors
    return config, load_file(str(folder / WEIGHTS))
