"""One encoder layer over packed tokens, forward and backward by hand. Knows no model class, no text and no loss.

Packed: the tokens of all texts in one (T, d) matrix without padding, texts of equal length beside each other. `groups` lists
(texts, length) in that order, so attention needs neither mask nor padding. Rows after the last group belong to no text.

LoRA without dropout is a change of the weight: the forward and the gradient of the input are one product each with
W + s·B·A, and A and B get their gradients from products that are r wide; the whole dW never exists (Hu et al. 2021, arXiv 2106.09685).
"""

# ruff: noqa: ARG004 (the adapters' tensors are arguments so that autograd sees them)
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embedft.attention import Groups, attention, attention_backward
from embedft.gelu import gelu
from embedft.prepacked import Prepacked, affine, usable


class Projection:
    """A frozen linear layer, with a LoRA on it or none: y = x (W + s·B·A)ᵀ + b. W (out, in), A (r, in), B (out, r)."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, a: Tensor | None = None, b: Tensor | None = None, scale: float = 0.0
    ) -> None:
        self.frozen, self.bias = weight, bias
        self.a, self.b, self.scale = a, b, scale
        self.enabled = True

    @property
    def lora(self) -> tuple[Tensor | None, Tensor | None]:
        return self.a, self.b

    @property
    def version(self) -> tuple[int, int]:
        """Changes when an optimizer has changed the LoRA in place, or it was switched."""
        return (self.a._version, self.b._version) if self.enabled and self.a is not None and self.b is not None else (-1, -1)

    def merged_into(self, out: Tensor) -> None:
        """`out` (out, in) becomes W + s·B·A; with the adapter off, or without one, W."""
        out.copy_(self.frozen)
        if self.enabled and self.a is not None and self.b is not None:
            out.addmm_(self.b.detach().to(out.dtype), self.a.detach().to(out.dtype), alpha=self.scale)


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    bias: Tensor
    eps: float


class Weight:
    """A matrix W (out, in) that rows are multiplied with forth, x·Wᵀ, and back, dy·W."""

    def __init__(self, plain: Tensor, *, frozen: bool) -> None:
        """`frozen`: nobody overwrites `plain`. Only then it is laid out: to do so after every step takes longer than that saves."""
        self._plain, self._lies = plain, not (frozen and usable(plain))
        self._forth: Prepacked | None = None
        self._back: Prepacked | None = None

    def forth(self, x: Tensor, bias: Tensor | None, *, plus: Tensor | None = None) -> Tensor:
        if self._lies:
            return affine(x, self._plain, bias, plus=plus)
        self._forth = self._forth or Prepacked(self._plain)
        return self._forth(x, bias, plus=plus)

    def back(self, dy: Tensor, *, plus: Tensor | None = None) -> Tensor:
        if self._lies:
            return affine(dy, self._plain.t(), None, plus=plus)
        self._back = self._back or Prepacked(self._plain.t())
        return self._back(dy, plus=plus)


class Layer:
    """What one post-norm encoder layer computes with; `weights` are remade only after an optimizer step."""

    def __init__(self, projections: Sequence[Projection], norms: tuple[Norm, Norm], *, heads: int) -> None:
        """`projections`: query, key, value, attention output, intermediate, output."""
        self.projections, self.norms, self.heads = tuple(projections), norms, heads
        query, key, value, *rest = projections
        size, width = query.frozen.shape
        qkv = torch.empty(3 * size, width, dtype=query.frozen.dtype)
        others = [projection.frozen if projection.a is None else torch.empty_like(projection.frozen) for projection in rest]
        parts = list(zip([*qkv.chunk(3), *others], self.projections, strict=True))
        for out, projection in parts[:3]:
            out.copy_(projection.frozen)
        self._adapted = [(out, projection) for out, projection in parts if projection.a is not None]
        owners = ((query, key, value), *((projection,) for projection in rest))
        self._weights = tuple(
            Weight(plain, frozen=all(projection.a is None for projection in of)) for plain, of in zip((qkv, *others), owners, strict=True)
        )
        biases = [projection.bias for projection in (query, key, value)]
        self.qkv_bias = None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])
        self._version: Any = None

    def weights(self) -> tuple[Weight, ...]:
        """qkv (3d, d), attention output (d, d), intermediate (m, d) and output (d, m), adapters merged in."""
        version = [projection.version for projection in self.projections]
        if version != self._version:
            with torch.no_grad():
                for out, projection in self._adapted:
                    projection.merged_into(out)
            self._version = version
        return self._weights

    def __call__(self, x: Tensor, groups: Groups) -> Tensor:
        """(T, d) → (T, d)."""
        query, key, value, output, intermediate, last = self.projections
        hidden: Any = _Attention.apply(x, self, groups, *query.lora, *key.lora, *value.lora, *output.lora)
        result: Any = _FeedForward.apply(hidden, self, *intermediate.lora, *last.lora)
        return result


def _gradients(x: Tensor | None, given: Sequence[tuple[Projection, Tensor]]) -> list[tuple[Tensor | None, Tensor | None]]:
    """dA (r, in) and dB (out, r) of projections of one x (T, in), from it and each one's dy (T, out). Without a LoRA there is no x to keep.

    Never a product wider than r; x is read twice for all of them together, and dy twice.
    """
    adapted = [(p.a, p.b, p.scale, dy) for p, dy in given if p.a is not None and p.b is not None]
    if x is None or not adapted:
        return [(None, None)] * len(given)
    ranks = [len(a) for a, _, _, _ in adapted]
    outer = torch.cat([dy @ b.to(x.dtype) for _, b, _, dy in adapted], dim=1)
    inner = (x @ torch.cat([a.to(x.dtype) for a, _, _, _ in adapted]).t()).split(ranks, dim=1)
    das = (outer.t() @ x).split(ranks)
    made = iter(
        (da.mul(scale).to(a.dtype), (v.t() @ dy).t().mul(scale).to(b.dtype))
        for (a, b, scale, dy), da, v in zip(adapted, das, inner, strict=True)
    )
    return [next(made) if p.a is not None else (None, None) for p, _ in given]


def _norm(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


def _norm_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm) -> Tensor:
    backward: Any = torch.ops.aten.native_layer_norm_backward
    return backward(dy, x, (x.shape[-1],), mean, rstd, norm.weight, norm.bias, [True, False, False])[0]


class _Attention(torch.autograd.Function):
    """LayerNorm(x + W_o·attention(W_qkv·x)): x (T, d) → (T, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, groups: Groups, *lora: Tensor | None) -> Tensor:
        qkv_weight, out_weight, _, _ = layer.weights()
        qkv = qkv_weight.forth(x, layer.qkv_bias)
        mixed, sums = attention(qkv, groups, layer.heads)
        summed = out_weight.forth(mixed, layer.projections[3].bias, plus=x)
        hidden, mean, rstd = _norm(summed, layer.norms[0])
        if any(ctx.needs_input_grad):
            ctx.layer, ctx.groups = layer, groups
            ctx.save_for_backward(x, qkv, mixed, summed, mean, rstd, sums)
        return hidden

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        layer, groups = ctx.layer, ctx.groups
        x, qkv, mixed, summed, mean, rstd, sums = ctx.saved_tensors
        qkv_weight, out_weight, _, _ = layer.weights()
        query, key, value, output = layer.projections[:4]
        dsum = _norm_backward(outputs[0].contiguous(), summed, mean, rstd, layer.norms[0])
        [dout] = _gradients(mixed, [(output, dsum)])
        dqkv = attention_backward(out_weight.back(dsum), qkv, mixed, sums, groups, layer.heads)
        inner = _gradients(x, list(zip((query, key, value), dqkv.chunk(3, dim=1), strict=True)))
        dx = qkv_weight.back(dqkv, plus=dsum) if ctx.needs_input_grad[0] else None
        return (dx, None, None, *(tensor for pair in (*inner, dout) for tensor in pair))


class _FeedForward(torch.autograd.Function):
    """LayerNorm(h + W_2·gelu(W_1·h)): h (T, d) → (T, d)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: Layer, *lora: Tensor | None) -> Tensor:
        _, _, first_weight, last_weight = layer.weights()
        wide = first_weight.forth(hidden, layer.projections[4].bias)
        active, slope = gelu(wide, sloped=any(ctx.needs_input_grad))
        summed = last_weight.forth(active, layer.projections[5].bias, plus=hidden)
        result, mean, rstd = _norm(summed, layer.norms[1])
        if any(ctx.needs_input_grad):
            ctx.layer = layer
            first, last = (projection.a is not None for projection in layer.projections[4:])
            ctx.save_for_backward(hidden if first else None, slope, active if last else None, summed, mean, rstd)
        return result

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        layer = ctx.layer
        hidden, slope, active, summed, mean, rstd = ctx.saved_tensors
        _, _, first_weight, last_weight = layer.weights()
        dsum = _norm_backward(outputs[0].contiguous(), summed, mean, rstd, layer.norms[1])
        [last] = _gradients(active, [(layer.projections[5], dsum)])
        dwide = last_weight.back(dsum).mul_(slope)
        [first] = _gradients(hidden, [(layer.projections[4], dwide)])
        dhidden = first_weight.back(dwide, plus=dsum) if ctx.needs_input_grad[0] else None
        return (dhidden, None, *first, *last)
