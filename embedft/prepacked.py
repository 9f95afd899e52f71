"""Linear layers of a frozen model by oneDNN, for a CPU. Knows no model class.

A weight that lies row by row is laid out anew for every product, which is half the time of a few tokens' in bf16. In fp32 torch asks MKL
instead: on the AMD processor with AVX512 that this was measured on, it takes twice as long.
"""

import functools
from typing import Any

import torch
from torch import Tensor

FEW_ROWS = 128  # of more in bf16, a weight as it lies is no slower
SHARE = 0.125  # of the memory that is free, for weights that are there twice
_ops: Any = torch.ops.mkldnn
_linear: Any = getattr(_ops, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_laid_out: Any = getattr(_ops, "_reorder_linear_weight", None)


def usable(weight: Tensor) -> bool:
    """Whether there is such a layout for it: a matrix of fp32 or bf16 on a CPU whose torch was built with oneDNN."""
    if weight.device.type != "cpu" or weight.dim() != 2 or _linear is None or _laid_out is None:
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bf16())


@functools.cache
def _has_bf16() -> bool:
    """Without the instructions for it oneDNN refuses bf16, where torch computes it some other way."""
    return bool(_ops._is_mkldnn_bf16_supported())


class Prepacked:
    """x (n, in) → x·Wᵀ, of a W (out, in) that is `usable` and that nobody changes. As large as W; W itself is not kept."""

    def __init__(self, weight: Tensor) -> None:
        with torch.no_grad():
            self._weight: Tensor = weight.clone() if _planned(weight) else _laid_out(weight.detach().contiguous())

    def __call__(self, x: Tensor, bias: Tensor | None = None, *, plus: Tensor | None = None) -> Tensor:
        """(…, out): x·Wᵀ + `bias` + `plus`, each added as the product is written. No gradient passes."""
        if _planned(x):
            return affine(x, self._weight, bias, plus=plus)
        if plus is None:
            return _linear(x, self._weight, bias, "none", [], "")
        return _linear.binary(x, plus, self._weight, bias, "add")


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, *, plus: Tensor | None = None) -> Tensor:
    """The same with a weight as it lies, for one that does not stay."""
    if usable(weight) and not _planned(x):
        return _linear(x, weight, bias, "none", [], "") if plus is None else _linear.binary(x, plus, weight, bias, "add")
    product = torch.nn.functional.linear(x, weight, bias)
    return product if plus is None else product.add_(plus)


class OneDnnLinear(torch.nn.Linear):
    """A frozen layer of a model that only infers. What asks for a gradient, or comes in another dtype, is computed as ever."""

    laid_out: Prepacked | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        if torch.is_grad_enabled() or input.dtype != self.weight.dtype:
            return super().forward(input)
        x = input.reshape(-1, self.in_features)
        gains = self.laid_out is not None and (len(x) <= FEW_ROWS or x.dtype == torch.float32)
        y = self.laid_out(x, self.bias) if gains and self.laid_out is not None else affine(x, self.weight, self.bias)
        return y.view(*input.shape[:-1], self.out_features)


def by_onednn(model: Any) -> None:
    """Have the linear layers of a frozen model computed so from now on; their weights are laid out too while there is much memory."""
    import psutil

    left = psutil.virtual_memory().available * SHARE
    for module in model.modules():
        if type(module) is torch.nn.Linear and usable(module.weight) and not module.weight.requires_grad:
            layer: Any = module
            layer.__class__ = OneDnnLinear
            left -= module.weight.numel() * module.weight.element_size()
            if left > 0:
                layer.laid_out = Prepacked(module.weight)


def _planned(x: Tensor) -> bool:
    """Whether it is of those without data, by which memory is planned: they take room, and oneDNN knows nothing of them."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor)
