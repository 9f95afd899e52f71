"""One base in memory and the adapters on it. Knows no request. But for `read`, it is called by one thread only.

Plain LoRA adapters sit on one model, where its layers work row by row, and mix (mixed.py). Virtual tokens of a language model are keys
and values in front of a row's own, so they mix with those. Every other adapter has a model of its own: other modules, the same weights, a
batch apart.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.adapters.passport import WEIGHTS
from embedft.errors import AdapterExists, AdapterInvalid, AdapterNotFound
from embedft.methods import METHODS, config_of, load_adapter
from embedft.methods.prompts import key_values
from serve.engines.peft.sharing import sharing_copy
from serve.engines.peft.threads import Threads

if TYPE_CHECKING:
    from torch import Tensor

    from embedft.base import Base
    from serve.engines.peft.mixed import MixedLinear, Pair

ADAPTER = "adapter"  # its name inside PEFT
Group = str | None  # None: rows that mix; else the name of an adapter that runs apart


class AdapterBank:
    """`model` is the base, with whatever plain LoRA its rows are asked to have."""

    def __init__(self, base: "Base") -> None:
        from embedft.prepacked import by_onednn
        from serve.engines.peft.mixed import Mix, Mixed, row_wise

        self.base = base
        self._bare: Any = sharing_copy(base.model)  # never adapted: what others are copied from
        self._row_wise = row_wise(base.model)
        by_onednn(base.model)
        self._mix = Mix()
        self.model: Any = Mixed(base.model, self._mix)
        self._slots: dict[str, int] = {}  # of those that mix
        self._layers: dict[str, MixedLinear] = {}
        self._prefixes: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._apart: dict[str, Any] = {}
        self.threads = Threads(_threads(base))

    @property
    def names(self) -> list[str]:
        return [*self._slots, *self._prefixes, *self._apart]

    def load(self, name: str, folder: Path) -> None:
        """Put the adapter of `folder` on the base. All or nothing. Raises AdapterExists, AdapterInvalid."""
        self.put(name, self.read(name, folder))

    def read(self, name: str, folder: Path) -> "Content":
        """What `put` takes. Any thread may call it while others use the base: this is what takes time. Raises AdapterInvalid."""
        try:
            return _read(name, folder, self._bare, self._row_wise)
        except AdapterInvalid as error:
            raise AdapterInvalid(name, error.reason) from error
        except Exception as error:
            raise AdapterInvalid(name, str(error).splitlines()[0][:300]) from error

    def put(self, name: str, content: "Content") -> None:
        """The same with what `read` gave. Raises AdapterExists."""
        if name in self.names:
            raise AdapterExists(f"adapter {name!r} is already loaded: unload it first, or load it under another name")
        if content.pairs is not None:
            slot = next(slot for slot in count() if slot not in self._slots.values())
            for module, pair in content.pairs.items():
                self._layer(module).put(slot, pair)
            self._slots[name] = slot
        elif content.prefix is not None:
            self._prefixes[name] = content.prefix
        else:
            self._apart[name] = content.model

    def unload(self, name: str) -> None:
        """Take it off and free its tensors. Raises AdapterNotFound."""
        self._known(name)
        if name in self._slots:
            slot = self._slots.pop(name)
            for layer in self._layers.values():
                layer.drop(slot)
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
        return {"slots": [self._slots.get(name, -1) if name else -1 for name in names]}

    def prefix(self, name: str | None) -> "list[tuple[Tensor, Tensor]] | None":
        """Keys and values, each (heads, tokens, size), a layer: what stands before a row of this adapter."""
        return self._prefixes.get(name) if name else None

    def _known(self, name: str) -> None:
        if name not in self.names:
            raise AdapterNotFound(name)  # and names no other: clients may be shown it

    def _layer(self, name: str) -> "MixedLinear":
        """The base's linear layer of this name, once it is adapted."""
        from serve.engines.peft.mixed import MixedLinear

        if name not in self._layers:
            parent, _, child = name.rpartition(".")
            owner = self.base.model.get_submodule(parent)
            self._layers[name] = MixedLinear(getattr(owner, child), self._mix)
            setattr(owner, child, self._layers[name])
        return self._layers[name]


@dataclass(frozen=True)
class Content:
    """What an adapter's folder holds: `pairs` by layer of one that mixes, a `prefix`, or a `model` of its own."""

    pairs: "dict[str, Pair] | None" = None
    prefix: "list[tuple[Tensor, Tensor]] | None" = None
    model: Any = None


def _read(name: str, folder: Path, bare: Any, mixable: Container[str]) -> Content:
    """AdapterInvalid for a method that is not in the table, or one that would write to the base."""
    from safetensors.torch import load_file

    from serve.engines.peft.mixed import pairs_of

    config = config_of(folder, name=name)
    kind = type(config).__name__
    if kind not in {method.config for method in METHODS.values()}:
        raise AdapterInvalid(name, f"this engine does not know its method ({kind}): convert it to LoRA where it was made")
    if getattr(config, "bias", "none") != "none" or getattr(config, "trainable_token_indices", None):
        raise AdapterInvalid(name, "it changes biases or token embeddings of the base, which all other rows would see")
    if config.is_prompt_learning and config.task_type == "CAUSAL_LM":
        return Content(prefix=key_values(load_adapter(sharing_copy(bare), folder, name=name)))
    if config.peft_type.value != "LORA" or config.use_dora or config.modules_to_save:
        return Content(model=load_adapter(sharing_copy(bare), folder, name=name))
    model = _filled(name, sharing_copy(bare), config, load_file(str(folder / WEIGHTS)))
    pairs = pairs_of(model, ADAPTER, bare.dtype, within=mixable)
    return Content(model=model) if pairs is None else Content(pairs=pairs)


def _filled(name: str, base: Any, config: Any, tensors: dict[str, Any]) -> Any:
    """The PeftModel of plain LoRA with these weights; AdapterInvalid where they are of another base."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config.base_model_name_or_path = base.name_or_path  # else PEFT warns that it differs
    model: Any = get_peft_model(base, config, adapter_name=ADAPTER)
    wanted = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    for key in sorted(set(wanted) | set(tensors)):
        shapes = [tuple(found[key].shape) if key in found else "none" for found in (wanted, tensors)]
        if shapes[0] != shapes[1]:
            raise AdapterInvalid(name, f"tensor {key}: the base expects {shapes[0]}, the file has {shapes[1]}")
    set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
    model.eval()
    model.requires_grad_(False)
    return model


def _threads(base: "Base") -> int:
    """That may work on it."""
    import torch

    return torch.get_num_threads() if base.model.device.type == "cpu" else 1
