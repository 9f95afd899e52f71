"""Attention of a model that trains: of examples that lie end to end in one row, each to itself; and of a bf16 model's short rows on a CPU,
where torch's backward kernel takes two to six times as long in bf16 as in float32. All else is transformers' own."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embedft.attention import flash, flash_backward
from embedft.shapes import few

SHORT = 192  # tokens; from there on the bf16 kernel is no slower
LIKE = 4  # lengths of a group of examples between one power of two and the next


def install() -> None:
    """Let transformers' `sdpa` be `attend` in this process. Any number of times."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    functions: Any = ALL_ATTENTION_FUNCTIONS
    functions.register("sdpa", attend)


def apart(lengths: Sequence[int], row: int) -> Tensor:
    """The lengths of the examples that lie end to end in a row of `row` tokens → what stands for them where a model expects its attention
    mask: (1, 1, 1, examples) int32, which transformers hands to `attend` as it is."""
    mask = torch.tensor(lengths, dtype=torch.int32)[None, None, None]
    mask.apart = _Apart(lengths, row, mask.device)  # type: ignore[attr-defined]
    return mask


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

    if attention_mask is not None and attention_mask.dtype == torch.int32:
        return _attend_apart(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more), None
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


class _Take(NamedTuple):
    """A choice of rows, and of these the ones that are of nothing, and 0."""

    rows: Tensor
    blank: Tensor

    def of(self, x: Tensor, dim: int) -> Tensor:
        made = x.index_select(dim, self.rows)
        return made.index_fill_(dim, self.blank, 0) if len(self.blank) else made


class _Apart:
    """How a row of examples is taken apart and put together: those of like lengths lie in one padded group."""

    def __init__(self, lengths: Sequence[int], row: int, device: torch.device) -> None:
        starts = [0, *itertools.accumulate(lengths)]
        alike: dict[int, list[int]] = {}
        for place, length in enumerate(lengths):
            alike.setdefault(few(length, steps=LIKE), []).append(place)
        self.groups = [(len(places), max(lengths[place] for place in places)) for places in alike.values()]
        slots: list[int] = []  # the place in the row of each slot of a group, or -1
        for places, (_, longest) in zip(alike.values(), self.groups, strict=True):
            for place in places:
                start, length = starts[place], lengths[place]
                slots += [*range(start, start + length), *[-1] * (longest - length)]
        back = [-1] * row
        for slot, place in enumerate(slots):
            if place >= 0:
                back[place] = slot
        self.out, self.back = (_take(rows, device) for rows in (slots, back))


def _take(rows: Sequence[int], device: torch.device) -> _Take:
    blank = [place for place, row in enumerate(rows) if row < 0]
    return _Take(torch.tensor([max(row, 0) for row in rows], device=device), torch.tensor(blank, dtype=torch.long, device=device))


class _Moved(torch.autograd.Function):
    """Rows taken by `way`; gradients go the other `way`. Each row that is of something is taken once, so nothing is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: _Take, other: _Take, dim: int) -> Tensor:
        ctx.other, ctx.dim = other, dim
        return way.of(x, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return ctx.other.of(grads[0], ctx.dim), None, None, None


def _attend_apart(module: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, **named: Any) -> Tensor:
    """(1, heads, row, size) → (1, row, heads, size): each example as a row of its own, 0 after the last."""
    if named.get("position_bias") is not None or named.get("cache") is not None:
        raise RuntimeError("attention with a bias of positions cannot keep the examples of a row apart")
    found: _Apart | None = getattr(lengths, "apart", None)
    if found is None:  # the mask was moved to a GPU: every layer is given the same
        found = lengths.apart = _Apart(lengths.flatten().tolist(), query.shape[2], query.device)  # type: ignore[attr-defined]
    taken: list[Sequence[Tensor]] = []
    for x in (query, key, value):
        slots: Any = _Moved.apply(x, found.out, found.back, 2)
        pieces = slots[0].split([count * length for count, length in found.groups], dim=1)
        taken.append([piece.unflatten(1, group).transpose(0, 1) for piece, group in zip(pieces, found.groups, strict=True)])
    made = [attend(module, q, k, v, None, is_causal=True, **named)[0] for q, k, v in zip(*taken, strict=True)]
    together = torch.cat([piece.flatten(0, 1) for piece in made])
    whole: Any = _Moved.apply(together, found.back, found.out, 0)
    return whole[None]
