"""C of our own, compiled once a machine with the compiler at hand; None where there is none. Knows no kernel."""

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

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
LIBRARIES = ("-lm",)
OFF = "EMBEDFT_NATIVE"  # "0": torch's kernels instead of ours
_log = logging.getLogger("embedft.native")


def library(source: Path, *, off: str) -> ctypes.CDLL | None:
    """`source` compiled and loaded. None without a compiler, with a line in the log that says why, and where the variable `off` is 0."""
    return None if os.environ.get(off) == "0" else _library(source)


def compiler() -> str | None:
    """$CC, or what there is."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@functools.cache
def _library(source: Path) -> ctypes.CDLL | None:
    found = compiler()
    if found is None:
        _log.info("%s: no C compiler, so torch computes it", source.stem)
        return None
    try:
        return ctypes.CDLL(str(_compiled(source, found)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s: not built (%s), so torch computes it", source.stem, error)
        return None


def _compiled(source: Path, compiler: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embedft" / "native"
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]  # what it may include lies beside it
    key = hashlib.sha256("\0".join((*texts, compiler, *FLAGS, _processor())).encode()).hexdigest()[:16]
    target = folder / f"{source.stem}-{key}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as stage:
        built = Path(stage) / target.name
        command = [compiler, *FLAGS, "-o", str(built), str(source), *LIBRARIES]
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
