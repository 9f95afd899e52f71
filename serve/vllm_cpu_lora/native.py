"""kernel.c as ctypes sees it; None where it cannot be compiled. Knows no vLLM."""

import ctypes
import functools
from pathlib import Path

from embedft.native import library as compiled

SOURCE = Path(__file__).with_name("kernel.c")
OFF = "VLLM_CPU_LORA_NATIVE"  # "0": compute with torch alone


class Projection(ctypes.Structure):
    """As kernel.c declares it."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("a_rank", ctypes.c_int64),
        ("a_slice", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("b", ctypes.c_void_p),
        ("outs", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("slices", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
    )


def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None: then torch does the work, slower where runs are short."""
    loaded = compiled(SOURCE, off=OFF)
    return None if loaded is None else _declared(loaded)


@functools.cache
def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.lora_add.argtypes = [ctypes.POINTER(Projection), pointer, size, pointer, size, pointer, pointer, size]
    loaded.lora_add.restype = ctypes.c_int
    return loaded
