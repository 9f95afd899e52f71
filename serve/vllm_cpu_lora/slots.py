"""The weights of all adapters of one projection, laid out for the kernels, with each adapter's true rank. Knows no vLLM.

A of all slices lies together, (slots, rank, slices, in), so that they shrink in one product. B lies (slots, rank, out), so that
it is read along the output. vLLM writes through views of its own shape; rows past an adapter's rank are zero and never read.
"""

import weakref
from typing import TYPE_CHECKING

import numpy as np

from serve.vllm_cpu_lora.native import Projection

if TYPE_CHECKING:
    from torch import Tensor

    from serve.vllm_cpu_lora.plan import Plan


class Slots:
    """a (slots, rank, slices, in), None where the input is shrunk already (an embedding); b[i] (slots, rank, out_i)."""

    def __init__(self, a: "Tensor | None", b: "list[Tensor]") -> None:
        self.a, self.b = a, b
        count, self.max_rank = b[0].shape[:2]
        self.ranks = np.zeros(count, dtype=np.int32)
        self.outs = np.array([part.shape[2] for part in b], dtype=np.int64)
        self.offsets = np.concatenate(([0], np.cumsum(self.outs)[:-1]))
        self.projection = self._projection()

    @classmethod
    def stacked(cls, a: "tuple[Tensor, ...]", b: "tuple[Tensor, ...]") -> "Slots":
        """For vLLM's stacked weights: a[i] (slots, 1, rank, in), b[i] (slots, 1, out_i, rank), empty as yet."""
        import torch

        slots, _, rank, inputs = a[0].shape
        together = torch.zeros(slots, rank, len(a), inputs, dtype=a[0].dtype)
        return cls(together, [torch.zeros(slots, part.shape[3], part.shape[2], dtype=part.dtype) for part in b])

    @classmethod
    def foreign(cls, a: "Tensor", b: "Tensor") -> "Slots":
        """One slice of stacked weights that are somebody else's: seen as they lie, every rank taken for the largest."""
        seen = cls(a.permute(0, 2, 1, 3), [b.squeeze(1).transpose(1, 2)])
        seen.ranks[:] = seen.max_rank
        return seen

    def a_views(self) -> "tuple[Tensor, ...]":
        """A in vLLM's shape, one a slice."""
        assert self.a is not None
        return tuple(self.a[:, :, i].unsqueeze(1) for i in range(self.a.shape[2]))

    def b_views(self) -> "tuple[Tensor, ...]":
        """B in vLLM's shape, one a slice."""
        return tuple(part.transpose(1, 2).unsqueeze(1) for part in self.b)

    def forget(self, slot: int) -> None:
        """Zero what the slot holds: only the rows that were written, so that unused ranks never take memory."""
        rank = int(self.ranks[slot])
        for part in self.b if self.a is None else (self.a, *self.b):
            part[slot, :rank] = 0
        self.ranks[slot] = 0

    def used_by(self, plan: "Plan") -> bool:
        """Whether any adapter of the batch adapts this projection."""
        return any(self.ranks[segment.slot] for segment in plan.segments)

    def _projection(self) -> Projection:
        import torch

        a, count = self.a, len(self.ranks)
        self._a_pointers = _of_slots(a) if a is not None else None
        self._b_pointers = np.concatenate([_of_slots(part) for part in self.b])
        strides = (a.stride(1), a.stride(2), a.shape[3]) if a is not None else (0, 0, 0)
        return Projection(
            self._a_pointers.ctypes.data if self._a_pointers is not None else None, *strides, self._b_pointers.ctypes.data,
            self.outs.ctypes.data, self.offsets.ctypes.data, self.ranks.ctypes.data, len(self.b), count, self.b[0].dtype == torch.bfloat16,
        )  # fmt: skip


def _of_slots(stacked: "Tensor") -> "np.ndarray":
    """Where each slot's weights begin."""
    return stacked.data_ptr() + np.arange(len(stacked), dtype=np.int64) * stacked.stride(0) * stacked.element_size()


# By the address of the first tensor that vLLM hands to its operations: those know neither layer nor adapter.
_BY_ADDRESS: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()


def remember(slots: Slots) -> None:
    """Have `slots_at` find these slots as long as somebody holds them."""
    _BY_ADDRESS[(slots.b[0] if slots.a is None else slots.a).data_ptr()] = slots


def slots_at(tensor: "Tensor") -> Slots | None:
    """The slots whose weights begin where this tensor does."""
    return _BY_ADDRESS.get(tensor.data_ptr())
