"""Files that are whole or absent, and hashes of what tensors they hold. Knows nothing of models."""

import ctypes
import fcntl
import gzip
import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from embedft.errors import DataError

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_STAGE = ".stage-"  # begins the name of a folder that is being written
_OLD = ".old-"  # begins the name of a folder that is being replaced


class HeaderInvalid(ValueError):
    """A safetensors file whose header is not what the format says."""


def tensor_table(path: Path) -> list[tuple[str, str, list[int], int, int]]:
    """(name, dtype, shape, first byte, length in bytes) of each tensor in a safetensors file. HeaderInvalid where it is malformed."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise HeaderInvalid(f"{path.name}: a pointer of git-lfs and no weights: fetch them with `git lfs pull`")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise HeaderInvalid(f"{path.name}: a header of {length} bytes in a file of {size}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            rows = [_row(name, entry) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HeaderInvalid(f"{path.name}: header not readable: {error}") from None
    body = 8 + length
    if any(not 0 <= row[3] <= row[4] <= size - body for row in rows):
        raise HeaderInvalid(f"{path.name}: a tensor lies outside the file")
    return [(name, dtype, shape, body + first, last - first) for name, dtype, shape, first, last in rows]


_EXPONENTS = {"F64": ("<u8", 0x7FF0_0000_0000_0000), "F32": ("<u4", 0x7F80_0000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


def not_finite(path: Path, table: Iterable[tuple[str, str, list[int], int, int]]) -> str | None:
    """The first tensor of `table`, which is a safetensors file's, that holds a NaN or an infinity: their exponent bits are all ones.

    Needs no torch."""
    import numpy as np

    for name, dtype, _, start, length in table:
        if dtype in _EXPONENTS and length:
            kind, ones = _EXPONENTS[dtype]
            values = np.memmap(path, kind, "r", start, length // np.dtype(kind).itemsize)
            if ((values & ones) == ones).any():
                return name
    return None


def _row(name: str, entry: dict[str, Any]) -> tuple[str, str, list[int], int, int]:
    first, last = entry["data_offsets"]
    return name, str(entry["dtype"]), [int(size) for size in entry["shape"]], int(first), int(last)


def hash_tensors(paths: Iterable[Path], *, then: Iterable[bytes] = ()) -> str:
    """sha256 (64 hex) over the sorted (name, dtype, shape, bytes) of all tensors in the safetensors files, then over `then`."""
    digest = hashlib.sha256()
    rows = sorted((*row[:3], path, *row[3:]) for path in paths for row in tensor_table(path))
    for name, dtype, shape, path, start, length in rows:
        digest.update(json.dumps([name, dtype, shape]).encode())
        with path.open("rb") as file:
            file.seek(start)
            while length > 0 and (chunk := file.read(min(length, 1 << 24))):
                digest.update(chunk)
                length -= len(chunk)
    for content in then:
        digest.update(content)
    return digest.hexdigest()


def hash_json(content: Any) -> str:
    """sha256 (64 hex) of `content` as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def staged_folder(parent: Path) -> Generator[Path]:
    """An empty folder inside `parent`, removed at the end unless it was moved away."""
    parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=parent))
    descriptor = os.open(stage, os.O_RDONLY)
    try:
        with suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # as long as this process lives: see abandoned_stages
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(descriptor)


def publish_folder(stage: Path, out: Path) -> None:
    """Move a finished folder to `out` in one step, after its bytes are on the disk. `out` must not hold anything."""
    _settle(stage)
    stage.rename(out)
    _fsync(out.parent)


def replace_folder(stage: Path, out: Path) -> None:
    """Move a finished folder to where the folder `out` is, in one step where the system can. Open files of the old one stay readable.

    Elsewhere there is none between two renames; after a crash just then `restore_folders` brings the old one back.
    """
    _settle(stage)
    if _exchange(stage, out):
        _fsync(out.parent)
        return
    out.rename(out.with_name(_OLD + out.name))
    try:
        stage.rename(out)
        _fsync(out.parent)
    finally:
        restore_folders(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Two paths take each other's place. False where the system (it is Linux's) or the disk knows no such step."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def abandoned_stages(parent: Path, *, seconds: float = 3600) -> list[Path]:
    """Staged folders that whoever made them did not live to take away: no process has them, and they are older than `seconds`."""
    found: list[Path] = []
    for stage in parent.glob(f"{_STAGE}*"):
        with suppress(OSError):  # taken away just now, or a disk without locks
            if time.time() - stage.stat().st_mtime > seconds and (descriptor := hold(stage)) is not None:
                os.close(descriptor)
                found.append(stage)
    return found


def restore_folders(parent: Path) -> None:
    """Finish the replacements in `parent` that were cut off: an old folder goes back where there is no new one, else it is deleted."""
    for old in parent.glob(f"{_OLD}*"):
        out = parent / old.name.removeprefix(_OLD)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out)


def unfinished(parent: Path) -> bool:
    """Whether a replacement in `parent` runs or was cut off."""
    return any(parent.glob(f"{_OLD}*"))


def _settle(stage: Path) -> None:
    for path in stage.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        _fsync(path)
    stage.chmod(0o755)
    _fsync(stage)


_NOT_MEANT = {"__pycache__", "node_modules", "site-packages"}


def passed_over(name: str) -> bool:
    """Whether a file or folder of that name is no part of what somebody means by the folder it is in."""
    return name.startswith(".") or name in _NOT_MEANT


def path_text(path: Path) -> str:
    """With slashes, in characters that any file and database takes: a byte that is not UTF-8 is written out, as \\xe9."""
    return os.fsencode(path.as_posix()).decode(errors="backslashreplace")


def expect_jsonl(path: Path) -> None:
    """Raises DataError where a file of this name would not be read as JSONL again."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError([f"{path}: rows are written as JSONL; expected a name that ends in .jsonl or .jsonl.gz"])


def expect_room(path: Path) -> None:
    """Make the folder of a file that is to be written when the work is done. DataError where nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise DataError([f"{path}: nothing can be written there ({error.strerror}): name another place"]) from None


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by one JSON object a line, through gzip where its name ends in .gz, in one step; the same rows, the same bytes."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    _write(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    _write(path, text.encode())


def _write(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:  # a full disk leaves the old file, and no half of the new one
        Path(name).unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Hold an exclusive lock on `path` (made if absent) against other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def in_use(path: Path) -> int | None:
    """A descriptor that, until it is closed, says beside others that `path` (made if absent) is in use; None on a disk without locks."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor
    return None


def hold(folder: Path) -> int | None:
    """A descriptor that keeps `folder` from every other process that asks the same, until it is closed; None where one has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
