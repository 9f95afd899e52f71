"""vLLM's CPU operations for LoRA, replaced: the plan of a batch, and what each layer adds. The one module that imports vLLM.

vLLM 0.32 gathers a (tokens, rank, dim) copy of the weights for each projection. It indexes that by -1 for a row without an
adapter, which then gets the adapter in the last slot, and its logits operation fails on prompt log-probabilities.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from vllm.lora import layers
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from serve.vllm_cpu_lora.kernels import add
from serve.vllm_cpu_lora.plan import NOTHING, Plan, make_plan
from serve.vllm_cpu_lora.slots import Slots, remember, slots_at


class SegmentedPunicaWrapper(PunicaWrapperCPU):
    """One plan a batch. A row of slot -1 is never touched. (With LoRA, vLLM's CPU platform never compiles: nothing here is traced.)"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = self.sampler_plan = NOTHING
        _adopt_layers()

    def update_metadata(self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **kwargs: Any) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        threads = torch.get_num_threads()
        # copies: vLLM writes the next batch's mapping into the same tensors
        self.plan = make_plan(self.token_lora_indices.numpy().copy(), threads=threads)
        self.sampler_plan = make_plan(self.sampler_indices.numpy().copy(), threads=threads)

    def add_lora_linear(
        self, y: Tensor, x: Tensor, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any, **kwargs: Any
    ) -> None:
        del output_slices, kwargs
        x = x.view(-1, x.shape[-1])
        _dispatch(y.view(-1, y.shape[-1]), x if scale == 1.0 else x * scale, lora_a_stacked, lora_b_stacked, self)

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        _dispatch(y, x, (), (lora_b_stacked,), self)

    def add_lora_logits(self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any) -> None:
        del lora_b_stacked, kwargs
        x = x.view(-1, x.shape[-1])
        slots = slots_at(lora_a_stacked)
        assert slots is not None, "the logits' LoRA weights were made before the plugin was registered"
        if slots.used_by(self.plan):
            add(y.view(-1, y.shape[-1]), x if scale == 1.0 else x * scale, slots, self.plan_of_logits(x))

    def plan_of_logits(self, x: Tensor) -> Plan:
        """Rows chosen for sampling are a copy; rows of one prompt, for its log-probabilities, a window of all hidden states, or all."""
        whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        if whole and len(x) == self.sampler_plan.tokens:
            return self.sampler_plan
        first = int(x.storage_offset()) // x.stride(0)
        if first + len(x) > self.plan.tokens or (whole and len(x) != self.plan.tokens):
            raise ValueError(f"{len(x)} rows of logits belong to no known adapter: the batch has {self.sampler_plan.tokens} requests")
        return self.plan.part(first, len(x))

    def add_shrink(self, y: Any, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any) -> None:
        """Only for sharded ranks (several CPUs by tensor parallelism): padded as vLLM gathers them between the products."""
        del kwargs
        for part, weights in zip(y, lora_a_stacked, strict=True):
            for rows, slot in _rows(self.plan):
                part[rows, : weights.shape[2]] = scale * (x[rows] @ weights[slot, 0].T).to(part.dtype)

    def add_expand(
        self, y: Tensor, x: Any, lora_b_stacked: tuple[Tensor, ...], output_slices: tuple[int, ...], offset_start: int = 0,
        add_inputs: bool = True, **kwargs: Any,
    ) -> None:  # fmt: skip
        """As add_shrink."""
        del kwargs
        for part, weights, size in zip(x, lora_b_stacked, output_slices, strict=True):
            for rows, slot in _rows(self.plan):
                change = (part[rows].to(weights.dtype) @ weights[slot, 0].T).to(y.dtype)
                columns = slice(offset_start, offset_start + size)
                y[rows, columns] = y[rows, columns] + change if add_inputs else change
            offset_start += size


def _rows(plan: Plan) -> list[tuple[Tensor, int]]:
    return [(plan.row_tensor[segment.first : segment.last], segment.slot) for segment in plan.segments]


def _dispatch(y: Tensor, x: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...], wrapper: SegmentedPunicaWrapper) -> None:
    slots = slots_at((a or b)[0])
    if slots is not None:
        add(y, x, slots, wrapper.plan)
        return
    start = 0
    for a_part, b_part in zip(a, b, strict=True):  # a layer class of somebody else, which allocates its own weights
        foreign = Slots.foreign(a_part, b_part)
        add(y[:, start : start + int(foreign.outs[0])], x, foreign, wrapper.plan)
        start += int(foreign.outs[0])


@functools.cache
def _adopt_layers() -> None:
    """Have vLLM's LoRA layers keep their weights in Slots. Layers are made after the first wrapper, so nothing is missed."""
    linear: Any = BaseLinearLayerWithLoRA
    for layer in (linear, layers.MergedColumnParallelLinearWithLoRA):
        _after(layer, "create_lora_weights", _lay_out_linear)
    _after(layers.LogitsProcessorWithLoRA, "create_lora_weights", _lay_out_logits)
    _after(layers.VocabParallelEmbeddingWithLoRA, "create_lora_weights", _lay_out_embedding)
    for layer in (
        linear,
        layers.MergedColumnParallelLinearWithLoRA,
        layers.LogitsProcessorWithLoRA,
        layers.VocabParallelEmbeddingWithLoRA,
    ):
        _after(layer, "set_lora", _note_rank)
        if "reset_lora" in vars(layer):
            _forget_ranks(layer)


def _after(layer: Any, name: str, then: Any) -> None:
    """Let `then(layer, *arguments)` follow a method."""
    stock = vars(layer)[name]

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        then(self, *args, **kwargs)

    setattr(layer, name, method)


def _forget_ranks(layer: Any) -> None:
    stock = layer.reset_lora

    @functools.wraps(stock)
    def reset_lora(self: Any, index: int) -> None:
        if (slots := vars(self).get("_slots")) is None:
            stock(self, index)
            return
        if slots.a is None:
            rank = int(slots.ranks[index])
            self.lora_a_stacked[index, :, :rank] = 0
        slots.forget(index)

    layer.reset_lora = reset_lora


def _lay_out_linear(self: Any, *_: Any, **__: Any) -> None:
    slots = Slots.stacked(self.lora_a_stacked, self.lora_b_stacked)
    self.lora_a_stacked, self.lora_b_stacked = slots.a_views(), slots.b_views()
    _keep(self, slots)


def _lay_out_logits(self: Any, *_: Any, **__: Any) -> None:
    slots = Slots.stacked((self.lora_a_stacked,), (self.lora_b_stacked,))
    (self.lora_a_stacked,), (self.lora_b_stacked,) = slots.a_views(), slots.b_views()
    _keep(self, slots)


def _lay_out_embedding(self: Any, *_: Any, **__: Any) -> None:
    count, _, out, rank = self.lora_b_stacked.shape
    slots = Slots(None, [torch.zeros(count, rank, out, dtype=self.lora_b_stacked.dtype)])
    (self.lora_b_stacked,) = slots.b_views()
    _keep(self, slots)


def _keep(self: Any, slots: Slots) -> None:
    self._slots = slots
    remember(slots)


def _note_rank(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
    del lora_b
    parts = lora_a if isinstance(lora_a, (list, tuple)) else [lora_a]
    rank = max((part.shape[0] for part in parts if part is not None), default=0)
    if (slots := vars(self).get("_slots")) is not None:
        slots.ranks[index] = min(rank, slots.max_rank)
