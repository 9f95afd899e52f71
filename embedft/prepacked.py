"""Linear layers of a frozen model by oneDNN, for a CPU. Knows no model class.

A weight that lies row by row is laid out anew for every product, which is half the time of a few tokens' in bf16. In fp32 torch asks MKL
instead, which on AMD's processors takes twice as long.
"""

from typing import Any

import torch
from torch import Tensor

_ops: Any = torch.ops.mkldnn
_linear: Any = getattr(_ops, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_laid_out: Any = getattr(_ops, "_reorder_linear_weight", None)


def usable(weight: Tensor) -> bool:
    """Whether there is such a layout for it: a matrix of fp32 or bf16 on a CPU whose torch was built with oneDNN."""
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu" and weight.dim() == 2
    return known and _linear is not None and _laid_out is not None


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


def _planned(x: Tensor) -> bool:
    """Whether it is of those without data, by which memory is planned: they take room, and oneDNN knows nothing of them."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor)
