"""Attention on a CPU, forward and backward apart: over packed texts by attention.c where it compiles, else by torch's flash kernels, a call
for every length of text. Knows no model class.

torch's kernels are made for long rows: on texts of 15 to 64 tokens they take three times as long, and widths of bf16 are copied about them.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedft import native
from embedft.native import OFF, library

flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateUsage]
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # pyright: ignore[reportPrivateUsage]

Groups = Sequence[tuple[int, int]]  # (texts, length) in the order of the rows; rows after the last group belong to no text
SOURCE = Path(__file__).with_name("attention.c")
STEP = 32  # a head's size is a multiple of it in attention.c


def rows_of(x: Tensor, groups: Groups) -> Sequence[Tensor]:
    """(T, d) → each group's rows of it."""
    sizes = [texts * length for texts, length in groups]
    return x[: sum(sizes)].split(sizes)


def kernels() -> str:
    """'compiled' or 'torch': what this machine computes attention with, to the bit."""
    return "torch" if _compiled() is None else "compiled"


def identity() -> str:
    """Of the compiled kernels, or 'torch': where it is the same, so is every bit of what they compute."""
    return native.identity(SOURCE, off=OFF)


def attention(qkv: Tensor, groups: Groups, heads: int) -> tuple[Tensor, Tensor]:
    """(T, 3·d) queries, keys and values → (T, d), 0 in rows of no text, and what `attention_backward` asks for."""
    loaded = _loaded(qkv, heads)
    made = _blank(qkv, groups, parts=3)
    if loaded is not None:
        sums = qkv.new_empty(len(qkv), heads, dtype=torch.float32)
        _compute(loaded, groups, heads, qkv, made, sums)
        return made, sums
    totals: list[Tensor] = []
    for (q, k, v), (out,) in zip(_heads(qkv, groups, heads, 3), _heads(made, groups, heads, 1), strict=True):
        attended, total = flash(q, k, v)
        out.copy_(attended)
        totals.append(total.flatten())
    return made, torch.cat(totals)


def attention_backward(grad: Tensor, qkv: Tensor, made: Tensor, sums: Tensor, groups: Groups, heads: int) -> Tensor:
    """(T, d) gradient of what `attention` made → (T, 3·d), 0 in rows of no text."""
    loaded = _loaded(qkv, heads)
    dqkv = _blank(qkv, groups)
    if loaded is not None:
        _compute(loaded, groups, heads, qkv, made, sums, grad.contiguous(), dqkv)
        return dqkv
    totals = sums.split([texts * heads * length for texts, length in groups])
    views = zip(*(_heads(t, groups, heads, n) for t, n in ((qkv, 3), (made, 1), (grad, 1), (dqkv, 3))), strict=True)
    for ((q, k, v), (attended,), (given,), targets), total in zip(views, totals, strict=True):
        for target, part in zip(targets, flash_backward(given, q, k, v, attended, total.view(q.shape[:3])), strict=True):
            target.copy_(part)
    return dqkv


def _blank(like: Tensor, groups: Groups, *, parts: int = 1) -> Tensor:
    """(T, width / parts): room for every text's rows; those of no text are 0."""
    made = like.new_empty(len(like), like.shape[1] // parts)
    made[sum(texts * length for texts, length in groups) :] = 0
    return made


def _heads(rows: Tensor, groups: Groups, heads: int, parts: int) -> list[tuple[Tensor, ...]]:
    """Views of (T, parts·d) for each group: `parts` tensors (texts, heads, length, d / heads)."""
    views: list[tuple[Tensor, ...]] = []
    for (texts, length), piece in zip(groups, rows_of(rows, groups), strict=True):
        shaped = piece.view(texts, length, parts, heads, -1)
        views.append(tuple(part.transpose(1, 2) for part in shaped.unbind(2)))
    return views


class _Texts(ctypes.Structure):
    """As attention.c declares it."""

    _fields_ = (
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("texts", ctypes.c_int64),
        ("longest", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def _compute(loaded: ctypes.CDLL, groups: Groups, heads: int, qkv: Tensor, *tensors: Tensor) -> None:
    """attention.c over these tensors: made and sums, or with the gradient and where to put its own. Those without data, by which memory
    is planned, it leaves alone."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(qkv, FakeTensor):
        return
    lengths = torch.tensor([length for texts, length in groups for _ in range(texts)], dtype=torch.int64)
    starts = lengths.cumsum(0) - lengths
    size, longest = qkv.shape[1] // (3 * heads), max(length for _, length in groups)
    about = (len(lengths), longest, heads, size, int(qkv.dtype == torch.bfloat16), torch.get_num_threads())
    texts = _Texts(starts.data_ptr(), lengths.data_ptr(), *about)
    addresses = [tensor.data_ptr() for tensor in (qkv, *tensors)]
    if loaded.attention(ctypes.byref(texts), *addresses, *[None] * (5 - len(addresses))):
        raise MemoryError("no memory for attention over packed rows")


def _loaded(qkv: Tensor, heads: int) -> ctypes.CDLL | None:
    """attention.c, where it can compute this."""
    usable = qkv.dtype in (torch.float32, torch.bfloat16) and qkv.is_contiguous() and qkv.shape[1] % (3 * heads * STEP) == 0
    return _compiled() if usable else None


def _compiled() -> ctypes.CDLL | None:
    loaded = library(SOURCE, off=OFF)
    return None if loaded is None else _declared(loaded)


@functools.cache
def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.attention.argtypes = [ctypes.POINTER(_Texts), *[ctypes.c_void_p] * 5]
    loaded.attention.restype = ctypes.c_int
    return loaded


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, made: Tensor, sums: Tensor, *, causal: bool = False, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in float32 whatever these are: in bf16 the kernel takes several times as long on short rows."""
    wide = (tensor.float() for tensor in (grad, query, key, value, made, sums))
    return _backward(*wide, 0.0, causal, **more)
