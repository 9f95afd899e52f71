"""Linear layers over which every row of a batch has its own LoRA: what the layer adds for all of them is one call of a kernel.

PEFT computes a mixed batch adapter by adapter, in each of its layers. Here a pass knows once which rows belong to whom, and the kernels
are those of serve.vllm_cpu_lora. Knows no adapter's name and no request.
"""

from collections.abc import Container, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from serve.vllm_cpu_lora.kernels import add_natively
from serve.vllm_cpu_lora.native import Projection
from serve.vllm_cpu_lora.plan import Plan, make_plan

Pair = tuple[Tensor, Tensor]  # A (r, in) and B (r, out), its scale multiplied in
FIRST_SLOTS = 8
TRIED_ROWS, TRIED_TOKENS = (7, 11), 5


class Mix:
    """Which adapter each row of this pass has, or each token, by its slot: -1 is the base."""

    def __init__(self) -> None:
        self._slots: np.ndarray | None = None
        self._plans: dict[int, Plan] = {}

    @contextmanager
    def of(self, slots: Sequence[int] | None) -> Generator[None]:
        self._slots = None if slots is None or max(slots) < 0 else np.array(slots, dtype=np.int64)
        self._plans = {}
        try:
            yield
        finally:
            self._slots, self._plans = None, {}

    def plan(self, tokens: int) -> Plan | None:
        """For `tokens` of all rows together, each row's beside each other; None where nobody has an adapter."""
        if self._slots is None:
            return None
        if tokens not in self._plans:
            each, rest = divmod(tokens, len(self._slots))
            if rest:
                raise ValueError(f"{tokens} tokens are no whole number for each of {len(self._slots)} rows")
            self._plans[tokens] = make_plan(np.repeat(self._slots, each), threads=torch.get_num_threads())
        return self._plans[tokens]


class Mixed(nn.Module):
    """A model whose linear layers may be MixedLinear: `slots` says with which adapter each row runs, or each token of a single row."""

    def __init__(self, model: Any, mix: Mix) -> None:
        super().__init__()
        self.model, self._mix = model, mix

    def get_base_model(self) -> Any:
        """As a PeftModel has it."""
        return self.model

    def forward(self, *args: Any, slots: Sequence[int] | None = None, **named: Any) -> Any:
        with self._mix.of(slots):
            return self.model(*args, **named)


class MixedLinear(nn.Module):
    """A frozen linear layer, and the pair of every slot that adapts it."""

    def __init__(self, linear: Any, mix: Mix) -> None:
        super().__init__()
        self.base_layer, self._mix = linear, mix
        self._pairs: dict[int, Pair] = {}
        self._outs, self._offsets = np.array([linear.out_features], dtype=np.int64), np.zeros(1, dtype=np.int64)
        self._lay_out(FIRST_SLOTS)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def put(self, slot: int, pair: Pair) -> None:
        """Both of one dtype, contiguous, on the layer's device."""
        self._make_room(slot)
        self._pairs[slot] = pair
        self._point(slot)

    def drop(self, slot: int) -> None:
        """And so give its memory back. What is not there is dropped already."""
        if self._pairs.pop(slot, None) is not None:
            self._point(slot)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        y = self.base_layer(x)
        plan = self._mix.plan(x.numel() // x.shape[-1]) if self._pairs else None
        if plan is not None:
            self._make_room(plan.segments[-1].slot)
            if any(self._ranks[segment.slot] for segment in plan.segments):
                self._add(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), plan)
        return y

    def _add(self, y: Tensor, x: Tensor, plan: Plan) -> None:
        weights = next(iter(self._pairs.values()))[0]
        if y.device.type == "cpu" and add_natively(y, x, self._projection, weights, plan):
            return
        for segment in plan.segments:
            if (pair := self._pairs.get(segment.slot)) is not None:
                rows = plan.row_tensor[segment.first : segment.last].to(y.device)
                y.index_add_(0, rows, (x[rows].to(pair[0].dtype) @ pair[0].T @ pair[1]).to(y.dtype))

    def _make_room(self, slot: int) -> None:
        """The tables reach to `slot`, be it of an adapter that leaves this layer alone."""
        if slot >= len(self._ranks):
            self._lay_out(max(2 * len(self._ranks), slot + 1))

    def _lay_out(self, slots: int) -> None:
        """Tables with room for so many slots."""
        self._ranks = np.zeros(slots, dtype=np.int32)
        self._a, self._b = np.zeros(slots, dtype=np.int64), np.zeros(slots, dtype=np.int64)
        self._projection = self._declared()
        for slot in self._pairs:
            self._point(slot)

    def _point(self, slot: int) -> None:
        a, b = self._pairs.get(slot, (None, None))
        self._a[slot], self._b[slot] = (a.data_ptr(), b.data_ptr()) if a is not None and b is not None else (0, 0)
        self._ranks[slot] = 0 if a is None else len(a)
        if a is not None:
            self._projection.is_bf16 = int(a.dtype == torch.bfloat16)

    def _declared(self) -> Projection:
        """Without weights as yet, and so of no dtype."""
        width = int(self.base_layer.in_features)
        a, b, *tables = (table.ctypes.data for table in (self._a, self._b, self._outs, self._offsets, self._ranks))
        return Projection(a, width, width, width, b, *tables, 1, len(self._ranks), 0)


def row_wise(model: Any) -> frozenset[str]:
    """Linear layers that see the same number of positions of every row, row after row: only there a position says whose it is.

    DeBERTa's keys also see the table of relative positions, which all rows share; an expert sees what was routed to it.
    """
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
    seen: dict[str, list[list[int]]] = {name: [] for name in linears}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen[name][-1].append(given[0].numel() // given[0].shape[-1]))
        for name, module in linears.items()
    ]
    try:
        for rows in TRIED_ROWS:
            for found in seen.values():
                found.append([])
            ids = torch.ones(rows, TRIED_TOKENS, dtype=torch.long, device=model.device)
            with torch.inference_mode():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    few, more = TRIED_ROWS
    return frozenset(name for name, (one, other) in seen.items() if [count * more for count in one] == [count * few for count in other])


def pairs_of(model: Any, adapter: str, dtype: torch.dtype, *, within: Container[str]) -> dict[str, Pair] | None:
    """A PeftModel's pairs by the base's own names of its layers; None where one is more than a plain pair on a layer of `within`."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, Pair] = {}
    for name, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer) or name.startswith("pooler."):  # whose output nobody reads
            continue
        layer: Any = module
        base = layer.get_base_layer()
        plain = name in within and adapter in layer.lora_A and adapter not in layer.lora_variant
        if not plain or layer.lora_bias.get(adapter):
            return None
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        if a.shape[1] != base.in_features or b.shape[0] != base.out_features:
            return None
        found[name] = (a.to(dtype).contiguous(), (b.float() * layer.scaling[adapter]).T.to(dtype).contiguous())
    return found or None
