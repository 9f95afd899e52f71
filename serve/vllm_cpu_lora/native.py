"""kernel.c, compiled once a machine with the C compiler at hand; None where there is none. Knows no vLLM."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.c")
OFF = "VLLM_CPU_LORA_NATIVE"  # "0": compute with torch alone
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
_log = logging.getLogger("vllm.cpu_lora")


class Projection(ctypes.Structure):
    """As kernel.c declares it."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("a_slot", ctypes.c_int64),
        ("a_rank", ctypes.c_int64),
        ("a_slice", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("b", ctypes.c_void_p),
        ("outs", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("slices", ctypes.c_int64),
        ("max_rank", ctypes.c_int64),
        ("is_bf16", ctypes.c_int32),
    )


def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None: then torch does the work, slower where runs are short."""
    return None if os.environ.get(OFF) == "0" else _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        _log.info("vllm_cpu_lora: no C compiler, so LoRA is computed by torch")
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("vllm_cpu_lora: its kernel was not built (%s), so LoRA is computed by torch", error)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.lora_add.argtypes = [ctypes.POINTER(Projection), pointer, size, pointer, size, pointer, pointer, size]
    loaded.lora_add.restype = ctypes.c_int
    return loaded


def _compiled(compiler: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_cpu_lora"
    key = hashlib.sha256("\0".join((SOURCE.read_text(), compiler, *FLAGS, _processor())).encode()).hexdigest()[:16]
    target = folder / f"kernel-{key}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as stage:
        built = Path(stage) / "kernel.so"
        command = [compiler, *FLAGS, "-o", str(built), str(SOURCE)]
        try:
            subprocess.run([*command, "-fopenmp"], check=True, capture_output=True, timeout=120)
        except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread, still right
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        built.replace(target)
    return target


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
