"""Multi-LoRA for vLLM on a CPU: right for base rows, one pair of matrix products an adapter. Knows only vLLM's CPU wrapper.

vLLM 0.32 gathers a (tokens, rank, dim) copy of the weights, and indexes it by -1 for a row without an adapter: such a row
then gets the adapter in the last slot. Its add_lora_logits fails on prompt log-probabilities, and takes the engine down.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def install() -> None:
    """Replace the operations under vLLM's PunicaWrapperCPU, in this process."""
    from vllm.lora.punica_wrapper import punica_cpu

    wrapper: Any = punica_cpu
    wrapper.bgmv_shrink, wrapper.bgmv_expand, wrapper.bgmv_expand_slice = shrink, expand, expand_slice
    wrapper.sgmv_shrink, wrapper.sgmv_expand, wrapper.sgmv_expand_slice = (
        _prefill(shrink),
        _prefill(expand),
        _prefill(expand_slice),
    )
    wrapper.PunicaWrapperCPU.add_lora_logits = _no_logits


def shrink(inputs: "Tensor", weights: "Tensor", out: "Tensor", slots: "Tensor", scaling: float = 1.0) -> None:
    """out[t, :r] = scaling · weights[slots[t]] inputs[t]; weights (slots, 1, r, in). Rows of slot -1 are left as they are."""
    for slot, rows in _by_slot(slots):
        part = inputs[rows].to(out.dtype) @ _matrix(weights, slot, out).T
        out[rows, : part.shape[1]] = scaling * part


def expand(inputs: "Tensor", weights: "Tensor", out: "Tensor", slots: "Tensor", add_inputs: bool = True) -> None:
    """out[t] (+)= weights[slots[t]] inputs[t]; weights (slots, 1, out, r); where padding differs, the common width."""
    expand_slice(inputs, weights, out, slots, 0, out.shape[1], add_inputs)


def expand_slice(
    inputs: "Tensor", weights: "Tensor", out: "Tensor", slots: "Tensor", offset: int, size: int, add_inputs: bool = True
) -> None:
    """The same into the columns from `offset` on, at most `size` of them."""
    for slot, rows in _by_slot(slots):
        part = inputs[rows].to(out.dtype) @ _matrix(weights, slot, out).T
        width = min(part.shape[1], size)
        columns = slice(offset, offset + width)
        if add_inputs:
            out[rows, columns] += part[:, :width]
        else:
            out[rows, columns] = part[:, :width]


def _by_slot(slots: "Tensor") -> "Iterator[tuple[int, Any]]":
    """Each slot in use with its rows: all of them as a slice, else their indices."""
    used = slots.unique().tolist()
    for slot in used:
        if slot >= 0:
            yield slot, slice(0, len(slots)) if len(used) == 1 else (slots == slot).nonzero().squeeze(1)


def _matrix(weights: "Tensor", slot: int, like: "Tensor") -> "Tensor":
    matrix = weights[slot].to(like.dtype)
    return matrix.squeeze(0) if matrix.dim() == 3 else matrix


def _prefill(operation: Any) -> Any:
    """The same operation where vLLM gives one slot a sequence and the sequences' lengths."""

    def on_sequences(
        inputs: "Tensor", weights: "Tensor", out: "Tensor", starts: "Tensor", lengths: "Tensor", slots: "Tensor",
        batches: int, longest: int, tokens: int, *rest: Any, **named: Any,
    ) -> None:  # fmt: skip
        import torch

        del starts, batches, longest, tokens
        operation(inputs, weights, out, torch.repeat_interleave(slots, lengths), *rest, **named)

    return on_sequences


def _no_logits(self: Any, *_: Any, **__: Any) -> None:
    """No adapter here adapts the output embedding (serve.engines.vllm_server refuses those), so there is nothing to add."""
    del self
