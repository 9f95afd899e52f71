"""A copy of a model's modules over the same tensors: another adapter can sit on it, and it costs no memory worth naming."""

import copy
from typing import Any


def sharing_copy(model: Any) -> Any:
    """`model` again with modules of its own; parameters, buffers and quantization states are the very same objects."""
    import torch

    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        for name in ("state", "quant_state"):  # bitsandbytes keeps scales beside its parameters
            if (state := vars(module).get(name)) is not None:
                shared[id(state)] = state
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                shared[id(value)] = value
    return copy.deepcopy(model, shared)
