"""torch's flash attention on a CPU, forward and backward apart, for layers whose gradients are written by hand."""

from typing import Any

import torch
from torch import Tensor

flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateUsage]
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # pyright: ignore[reportPrivateUsage]


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, made: Tensor, sums: Tensor, *, causal: bool = False, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in float32 whatever these are: in bf16 the kernel takes several times as long on short rows."""
    wide = (tensor.float() for tensor in (grad, query, key, value, made, sums))
    return _backward(*wide, 0.0, causal, **more)
