"""y += B A x, for each token with its own adapter's A and B: by the compiled kernel, else by torch. Knows no vLLM.

In bf16 on a processor with matrix units (AMX) torch multiplies some ten times faster than the kernel, which computes in fp32:
there the kernel is for short groups only.

torch has three ways, chosen by what was measured (MiniLM's and a small Llama's projections, rank 16, one core, fp32):
long runs as one pair of products each; few tokens over many adapters as one batched product, the groups padded to the longest
(2 to 4 times faster than stacking all adapters under a mask, which multiplies tokens × adapters); else one pair an adapter.
"""

import functools
from typing import TYPE_CHECKING

import numpy as np

from serve.vllm_cpu_lora import native
from serve.vllm_cpu_lora.native import Projection

if TYPE_CHECKING:
    from torch import Tensor

    from serve.vllm_cpu_lora.plan import Plan, Segment
    from serve.vllm_cpu_lora.slots import Slots

LONG_RUN = 64  # tokens: from here on gathering costs more than a product on a shorter run loses
FEW_TOKENS = 256
SHORT_GROUP = 16  # tokens an adapter, on average: fewer leave a matrix unit (tiles of 16 rows) mostly empty


def add(y: "Tensor", x: "Tensor", slots: "Slots", plan: "Plan") -> None:
    """y (tokens or more, sum of outs) += the adapters' change, in place; x (tokens or more, in)."""
    if not slots.used_by(plan):
        return
    if min(len(x), len(y)) < plan.tokens:
        raise ValueError(f"a LoRA layer got {len(x)} rows, but the batch has {plan.tokens} tokens")
    if not add_natively(y, x, slots.projection, slots.b[0], plan):
        by_torch(y, x, slots, plan)


def add_natively(y: "Tensor", x: "Tensor", projection: Projection, weights: "Tensor", plan: "Plan") -> bool:
    """The same by the compiled kernel, False where it cannot or torch is faster. `weights`: any of the projection's."""
    import torch

    if weights.dtype == torch.bfloat16 and len(plan.rows) >= SHORT_GROUP * len(plan.segments) and has_matrix_units():
        return False
    usable = weights.is_contiguous() and x.dtype == y.dtype == weights.dtype and weights.dtype in (torch.float32, torch.bfloat16)
    if not usable or y.stride(1) != 1 or (library := native.library()) is None:
        return False
    x = x if x.stride(1) == 1 else x.contiguous()
    if library.lora_add(projection, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), *plan.addresses):
        raise MemoryError("no memory for a LoRA product")
    return True


@functools.cache
def has_matrix_units() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())  # pyright: ignore[reportPrivateUsage]


def by_torch(y: "Tensor", x: "Tensor", slots: "Slots", plan: "Plan") -> None:
    """The same without the compiled kernel."""
    x = x.to(slots.b[0].dtype)
    longest = max(segment.last - segment.first for segment in plan.segments)
    if len(plan.runs) * LONG_RUN <= len(plan.rows) or len(plan.runs) == len(plan.segments):
        for run in plan.runs:
            _segment(y[run.first : run.last], x[run.first : run.last], slots, run.slot)
    elif len(plan.rows) <= FEW_TOKENS and longest * len(plan.segments) <= 2 * len(plan.rows):
        _batched(y, x, slots, plan, longest)
    else:
        for segment in plan.segments:
            rows = plan.row_tensor[segment.first : segment.last]
            change = y.new_zeros(len(rows), y.shape[1])
            _segment(change, x[rows], slots, segment.slot)
            y.index_add_(0, rows, change)


def _segment(y: "Tensor", x: "Tensor", slots: "Slots", slot: int) -> None:
    """One adapter: y (rows, outs) += its change; x (rows, in)."""
    rank, slices = int(slots.ranks[slot]), len(slots.b)
    if not rank:
        return
    # (rank · slices, rows), so that each slice's part has unit stride and the next product takes it as it lies
    shrunk = x[:, :rank].T if slots.a is None else slots.a[slot, :rank].reshape(rank * slices, -1) @ x.T
    for i, (offset, size) in enumerate(zip(slots.offsets, slots.outs, strict=True)):
        part = y[:, offset : offset + size]
        if part.dtype == shrunk.dtype:
            part.addmm_(shrunk[i::slices].T, slots.b[i][slot, :rank])
        else:
            part += shrunk[i::slices].T @ slots.b[i][slot, :rank]


def _batched(y: "Tensor", x: "Tensor", slots: "Slots", plan: "Plan", longest: int) -> None:
    """All adapters at once, padded: (adapters, rank · slices, in) × (adapters, in, longest)."""
    import torch

    rank, slices = int(max(slots.ranks[segment.slot] for segment in plan.segments)), len(slots.b)
    index, real = _padded(plan.segments, longest)
    rows = plan.row_tensor[torch.from_numpy(index)]  # (adapters, longest)
    used = torch.tensor([segment.slot for segment in plan.segments])
    inputs = x[rows]
    if slots.a is None:
        shrunk = inputs[:, :, :rank].transpose(1, 2)
    else:
        shrunk = torch.bmm(slots.a[used, :rank].reshape(len(used), rank * slices, -1), inputs.transpose(1, 2))
    keep = torch.from_numpy(real)
    for i, (offset, size) in enumerate(zip(slots.offsets, slots.outs, strict=True)):
        change = torch.bmm(shrunk[:, i::slices].transpose(1, 2), slots.b[i][used, :rank])
        y[:, offset : offset + size].index_add_(0, rows[keep], change[keep].to(y.dtype))


def _padded(segments: "tuple[Segment, ...]", longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(adapters, longest) indices into the plan's rows, the last of a group repeated, and which of them are not padding."""
    first = np.array([segment.first for segment in segments])[:, None]
    last = np.array([segment.last for segment in segments])[:, None]
    index = first + np.arange(longest)
    return np.minimum(index, last - 1), index < last
