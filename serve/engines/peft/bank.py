"""One base in memory and the adapters on it. Called by one thread only; knows no request.

Plain LoRA adapters sit on one model and mix row by row. Virtual tokens of a language model are keys and values in front of a row's
own, so they mix with those. Every other method has a model of its own: other modules, the same weights, a batch apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.adapters.passport import CONFIG, WEIGHTS
from embedft.errors import AdapterExists, AdapterInvalid, AdapterNotFound
from embedft.methods import METHODS, load_adapter
from embedft.methods.prompts import key_values
from serve.engines.peft.sharing import sharing_copy
from serve.engines.peft.threads import Threads

if TYPE_CHECKING:
    from torch import Tensor

    from embedft.base import Base

HARMLESS_INITS = ("gaussian", "eva", "orthogonal")  # PiSSA, OLoRA, LoftQ and CorDA subtract what they start from
BASE = "__base__"  # PEFT's name, in `adapter_names`, for a row without an adapter
Group = str | None  # None: rows that mix; else the name of an adapter that runs apart


class AdapterBank:
    """`model` is the base itself while no plain LoRA is loaded, else the PeftModel around it."""

    def __init__(self, base: "Base") -> None:
        self.base = base
        self.model: Any = base.model
        self._bare: Any = sharing_copy(base.model)  # never adapted: what models apart are copied from
        self._slots: dict[str, str] = {}  # adapter's name → its name inside PEFT, where a dot is not allowed
        self._prefixes: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._apart: dict[str, Any] = {}
        self._next = 0
        self.threads = Threads(_threads(base))

    @property
    def names(self) -> list[str]:
        return [*self._slots, *self._prefixes, *self._apart]

    def load(self, name: str, folder: Path) -> None:
        """Put the adapter of `folder` on the base. All or nothing. Raises AdapterExists, AdapterInvalid."""
        self.put(name, read(name, folder))

    def put(self, name: str, content: "Content") -> None:
        """The same with what `read` gave, which any thread may call."""
        if name in self.names:
            raise AdapterExists(f"adapter {name!r} is already loaded: unload it first, or load it under another name")
        try:
            if content.tensors is not None:
                self._mix(name, content.config, content.tensors)
            elif content.config.is_prompt_learning and content.config.task_type == "CAUSAL_LM":
                self._prefixes[name] = key_values(load_adapter(sharing_copy(self._bare), content.folder))
            else:
                self._apart[name] = load_adapter(sharing_copy(self._bare), content.folder)
        except AdapterInvalid as error:
            raise AdapterInvalid(name, error.reason) from error
        except Exception as error:
            raise AdapterInvalid(name, str(error).splitlines()[0][:300]) from error

    def unload(self, name: str) -> None:
        """Take it off and free its tensors. Raises AdapterNotFound."""
        self._known(name)
        if name in self._slots:
            self._detach(self._slots.pop(name))
        self._prefixes.pop(name, None)
        self._apart.pop(name, None)

    def group(self, name: str | None) -> Group:
        """Rows of one group run in one forward pass. Raises AdapterNotFound."""
        if name is not None:
            self._known(name)
        return name if name in self._apart else None

    def model_of(self, group: Group) -> Any:
        return self.model if group is None else self._apart[group]

    def rows(self, names: Sequence[str | None]) -> dict[str, Any]:
        """What to pass to the group's model so that row i runs with adapter names[i], None being the base. Raises AdapterNotFound."""
        groups = {self.group(name) for name in names}
        if not self._slots or groups != {None}:
            return {}
        return {"adapter_names": [self._slots.get(name, BASE) if name else BASE for name in names]}

    def prefix(self, name: str | None) -> "list[tuple[Tensor, Tensor]] | None":
        """Keys and values, each (heads, tokens, size), a layer: what stands before a row of this adapter."""
        return self._prefixes.get(name) if name else None

    def _known(self, name: str) -> None:
        if name not in self.names:
            raise AdapterNotFound(name, self.names)

    def _mix(self, name: str, config: Any, tensors: dict[str, Any]) -> None:
        config.base_model_name_or_path = self.base.model.name_or_path  # else PEFT warns that it differs
        slot = f"a{self._next}"
        self._next += 1
        try:
            self._attach(slot, config)
            self._fill(slot, name, tensors)
        except Exception:
            self._detach(slot)
            raise
        self._slots[name] = slot

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


@dataclass(frozen=True)
class Content:
    """What an adapter's folder holds. `tensors` of plain LoRA only: what mixes row by row."""

    folder: Path
    config: Any
    tensors: dict[str, Any] | None


def read(name: str, folder: Path) -> Content:
    """AdapterInvalid for a method that is not in the table, or one that would write to the base."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise AdapterInvalid(name, f"its folder lacks {CONFIG} or {WEIGHTS}")
    config: Any = PeftConfig.from_pretrained(str(folder))
    kind = type(config).__name__
    if kind not in {method.config for method in METHODS.values()}:
        raise AdapterInvalid(name, f"this engine does not know its method ({kind}): convert it to LoRA where it was made")
    if getattr(config, "layer_replication", None):
        raise AdapterInvalid(name, "it replicates layers of the base, which all other rows would see")
    if getattr(config, "bias", "none") != "none" or getattr(config, "trainable_token_indices", None):
        raise AdapterInvalid(name, "it changes biases or token embeddings of the base, which all other rows would see")
    start = getattr(config, "init_lora_weights", True)
    if not isinstance(start, bool) and start not in HARMLESS_INITS:
        raise AdapterInvalid(name, f"{start} starts from a changed base, which other rows would see: convert it to LoRA")
    config.inference_mode = True
    if config.peft_type.value != "LORA" or config.use_dora or config.modules_to_save:
        return Content(folder, config, None)
    config.init_lora_weights = True  # drawn cheaply, then overwritten; PiSSA and its like would rewrite base tensors
    return Content(folder, config, load_file(str(folder / WEIGHTS)))


def _threads(base: "Base") -> int:
    """That may work on it."""
    import torch

    return torch.get_num_threads() if base.model.device.type == "cpu" else 1
