"""bitsandbytes' int8 weights with activations left in floating point. Knows no model and no adapter.

LLM.int8() (arXiv 2208.07339) also quantizes the activations, in a way that depends on the batch and magnifies the last bit of a
float: two engines then differ by more than a small adapter's whole effect. With the weights alone in int8 they agree to rounding.
"""

from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def int8_linear(x: "torch.Tensor", codes: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
    """x (..., in), codes (out, in) int8, scale (out,) absolute row maxima → x @ (codes · scale / 127).T, (..., out) in x's dtype.

    The floating-point weight lives for one product only, forward and backward; the gradient is that of x alone.
    """
    product: Any = _function().apply(x, codes, scale)
    return product


@cache
def _function() -> Any:
    import torch

    class Int8Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, codes: Any, scale: Any) -> Any:
            ctx.save_for_backward(codes, scale)
            return x @ dequantized(codes, scale, dtype=x.dtype).T

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            codes, scale = ctx.saved_tensors
            return gradients[0] @ dequantized(codes, scale, dtype=gradients[0].dtype), None, None

    return Int8Linear


def dequantized(codes: "torch.Tensor", scale: "torch.Tensor", *, dtype: "torch.dtype") -> "torch.Tensor":
    """codes (out, in) int8 and scale (out,) → (out, in) in `dtype`."""
    return codes.to(dtype) * (scale / 127.0).to(dtype)[:, None]


def keep_activations(model: Any) -> None:
    """Let every int8 layer of a loaded model compute by `int8_linear`."""
    from bitsandbytes.nn.modules import Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.forward = MethodType(_forward, module)


def _forward(self: Any, x: "torch.Tensor") -> "torch.Tensor":
    scale = self.weight.SCB if self.weight.SCB is not None else self.state.SCB
    out = int8_linear(x, self.weight.data, scale)
    return out if self.bias is None else out + self.bias.to(out.dtype)
