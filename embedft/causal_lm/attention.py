"""Attention of a bf16 model that trains on a CPU on short rows, where torch's backward kernel takes two to six times as long in bf16 as in
float32. Everything else, and everywhere else, is transformers' own."""

from typing import Any

import torch
from torch import Tensor

from embedft.attention import flash, flash_backward

SHORT = 192  # tokens; from there on the bf16 kernel is no slower


def install(dtype: torch.dtype, device: str) -> None:
    """Let transformers' `sdpa` be `attend` in this process, where that helps. Any number of times."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    if dtype == torch.bfloat16 and device == "cpu":
        functions.register("sdpa", attend)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """(batch, heads, length, size) → (batch, length, heads, size), as transformers' sdpa_attention_forward."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    plain = dropout == 0 and query.shape[2] == key.shape[2] < SHORT and more.get("position_bias") is None and more.get("cache") is None
    if not (trains and plain and query.dtype == torch.bfloat16 and query.device.type == "cpu"):
        stock: Any = sdpa_attention_forward
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more)
    groups = getattr(module, "num_key_value_groups", 1)
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    made: Any = _Attention.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), _additive(attention_mask), causal, scaling)
    return made.transpose(1, 2).contiguous(), None


def _additive(mask: Tensor | None) -> Tensor | None:
    """A mask that is added: float32, -inf where `mask` is False."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.float()
    return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        made, sums = flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, made, sums, mask)
        ctx.causal, ctx.scale = causal, scale
        return made

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        *given, mask = ctx.saved_tensors
        grads = flash_backward(outputs[0], *given, causal=ctx.causal, attn_mask=mask, scale=ctx.scale)
        return (*(grad.to(outputs[0].dtype) for grad in grads), None, None, None)
