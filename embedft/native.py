"""C of our own, compiled once a machine with the compiler at hand; None where there is none. Knows no kernel."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
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
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        _log.warning("%s: not built (%s), so torch computes it\n%s", source.stem, error, said.decode("utf-8", "replace")[-1000:])
        return None


def identity(source: Path, *, off: str) -> str:
    """What decides, to the bit, what `source` computes here: 'torch' where it is not compiled."""
    found = compiler()
    return "torch" if library(source, off=off) is None or found is None else _key(source, found)


def _key(source: Path, compiler: str) -> str:
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]  # what it may include lies beside it
    return hashlib.sha256("\0".join((*texts, compiler, *FLAGS, processor())).encode()).hexdigest()[:16]


def _folder() -> Path:
    """Where it is kept: the user's cache, or of a user without a home a folder of its own that nobody else may write to."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(given or Path.home() / ".cache") / "embedft" / "native"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"embedft-native-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to another user")
    return folder


def _compiled(source: Path, compiler: str) -> Path:
    folder = _folder()
    target = folder / f"{source.stem}-{_key(source, compiler)}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as stage:
        built = Path(stage) / target.name
        command = [*shlex.split(compiler), *FLAGS, "-o", str(built), str(source), *LIBRARIES]
        try:
            subprocess.run([*command, "-fopenmp"], check=True, capture_output=True, timeout=120)
        except subprocess.CalledProcessError:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            _log.warning("%s: the compiler knows no OpenMP, so it runs on one thread", source.stem)
        built.replace(target)
    return target


def processor() -> str:
    """What -march=native depends on: a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
