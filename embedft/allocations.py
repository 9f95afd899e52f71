"""What one forward and backward pass allocates, op by op, on tensors that hold no data. Knows no recipe and no method."""

import gc
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter  # pyright: ignore[reportPrivateImportUsage]

from embedft.steady import steady

COLLECT_EVERY = 50  # operations
_PRODUCTS = frozenset({"mm", "addmm", "bmm"})


@dataclass(frozen=True)
class Trace:
    """`peak_bytes`: of all that the step allocates, gradients included. `written_bytes`: by all ops together; `operations`: how many;
    `flops`: of the matrix products (a multiplication and an addition are two)."""

    peak_bytes: int
    written_bytes: int
    operations: int
    flops: int


class Allocations(TorchDispatchMode):
    """Counts the bytes of live storages. `held`: tensors that are there already; `unpacked`: frozen weight → bytes that a quantized
    layer needs beside its product, for as long as that takes."""

    def __init__(self, held: Mapping[str, torch.Tensor], unpacked: Mapping[str, int]) -> None:
        super().__init__()
        self.now = self.peak = self.written = self.operations = 0
        self._known: dict[int, int] = {key_of(tensor): 0 for tensor in held.values()}
        self._unpacked = {key_of(held[name]): size for name, size in unpacked.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        if self.operations % COLLECT_EVERY == 0:
            gc.collect()  # checkpointing leaves tensors in reference cycles, which only their data's owner would free at once
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        extra = self._beside(func, args) if self._unpacked else 0
        self.peak = max(self.peak, self.now + extra)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = key_of(tensor)
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = size
            self.now += size
            self.written += size
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    def _beside(self, func: Any, args: Any) -> int:
        if func.overloadpacket.__name__ not in _PRODUCTS:
            return 0
        return max((self._unpacked.get(key_of(each), 0) for each in args if isinstance(each, torch.Tensor)), default=0)


def key_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # pyright: ignore[reportPrivateUsage]


def trace_step(
    model: Any, step: "Callable[[Callable[..., Any]], torch.Tensor]", *, unpacked: Mapping[str, int], dtype: torch.dtype
) -> Trace:
    """Run `step` forward and backward on tensors without data. `step` gets the model as a function and returns a loss.

    model: on the CPU, its memory never read. `dtype`: what products are computed in (autocast where that is not fp32).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call
    from torch.utils.flop_counter import FlopCounterMode

    flops: Any = FlopCounterMode(display=False)
    whole = _Step(model, step, autocast=torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made: dict[str, Any] = {
            name: torch.nn.Parameter(mode.from_tensor(value.detach()), requires_grad=value.requires_grad)
            for name, value in whole.named_parameters()
        }
        made |= {name: mode.from_tensor(value) for name, value in whole.named_buffers()}
        counted = Allocations(made, {f"model.{name}": size for name, size in unpacked.items()})
        with steady(), _experts_as_one(), flops, counted:
            functional_call(whole, made, ())
    return Trace(counted.peak, counted.written, counted.operations, int(flops.get_total_flops()))


@contextmanager
def _experts_as_one() -> Generator[None]:
    """A mixture's product of each token with its expert's matrix, as a product of all tokens with one: the same bytes and work, whereas
    torch knows no shape of the grouped one but in bf16."""
    from transformers.integrations import moe

    library: Any = moe
    own = library._grouped_mm
    library._grouped_mm = lambda given, weight, **_: given.to(weight.dtype) @ weight[0]
    try:
        yield
    finally:
        library._grouped_mm = own


class _Step(torch.nn.Module):
    """Forward and backward in one call, so that what is computed again in the backward pass meets the same parameters."""

    def __init__(self, model: Any, step: "Callable[[Callable[..., Any]], torch.Tensor]", *, autocast: Any) -> None:
        super().__init__()
        self.model, self._step, self._autocast = model, step, autocast

    def forward(self) -> None:
        with self._autocast:
            loss = self._step(self.model)
        loss.backward()
