"""GELU and its derivative on a CPU in one pass, by gelu.c where it compiles, else by torch. Knows no model class."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedft import native
from embedft.native import OFF, library

SOURCE = Path(__file__).with_name("gelu.c")


def gelu(x: Tensor, *, sloped: bool) -> tuple[Tensor, Tensor | None]:
    """The exact GELU of x and, if `sloped`, its derivative there; both as x."""
    from torch._subclasses.fake_tensor import FakeTensor

    loaded = _compiled() if x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous() else None
    if loaded is None:
        derivative: Any = torch.ops.aten.gelu_backward
        return torch.nn.functional.gelu(x), derivative(torch.ones_like(x), x) if sloped else None
    made, slope = torch.empty_like(x), torch.empty_like(x) if sloped else None
    if not isinstance(x, FakeTensor):  # by these memory is planned: they have no data
        to = None if slope is None else slope.data_ptr()
        loaded.gelu(x.data_ptr(), made.data_ptr(), to, x.numel(), int(x.dtype == torch.bfloat16), torch.get_num_threads())
    return made, slope


def identity() -> str:
    """As attention's: what decides every bit of it."""
    return native.identity(SOURCE, off=OFF)


def _compiled() -> ctypes.CDLL | None:
    loaded = library(SOURCE, off=OFF)
    return None if loaded is None else _declared(loaded)


@functools.cache
def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.gelu.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64, *[ctypes.c_int32] * 2]
    loaded.gelu.restype = None
    return loaded
