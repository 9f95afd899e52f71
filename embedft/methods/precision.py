"""Adapters are float32 on a base of any dtype: small steps are not rounded away, and each adapted layer answers in the base's dtype.

PEFT keeps LoRA so by itself; AdaLoRA and (IA)³ would make all layers after them float32, LLaMA-Adapter and full fine-tuning would train
in the base's own dtype.
"""

from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def settle(model: Any, dtype: "torch.dtype") -> None:
    """Adapter tensors of a PeftModel become float32, and what its adapted layers give the base's `dtype`."""
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if dtype is torch.float32:
        return

    def answer(_: Any, __: Any, output: Any) -> Any:
        return output.to(dtype) if isinstance(output, torch.Tensor) and output.is_floating_point() else output

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            for name in layer.adapter_layer_names:
                _float32(getattr(layer, name))
            layer.register_forward_hook(answer)
            if isinstance(module, LoraLayer):
                layer._cast_input_dtype = MethodType(_input, layer)
        elif hasattr(module, "adaption_prompt"):
            _float32(module.adaption_prompt)
            _float32(module.adaption_gate)


def _input(layer: Any, x: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """What a LoRA layer multiplies. PEFT makes it float32, as the adapter is, and autocast makes that bf16 again: two copies of each
    layer's input and two of its gradient, for the same bits. DoRA, and a frozen pair beside the trained one, do more with it."""
    import torch

    plain = len(layer.lora_A) == 1 and not layer.lora_variant
    if plain and torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)


def _float32(tensors: Any) -> None:
    """A parameter, or a module of them, in place: an optimizer may hold it already."""
    import torch

    for parameter in [tensors] if isinstance(tensors, torch.nn.Parameter) else tensors.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
