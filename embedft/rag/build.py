"""Documents → index: only what changed is embedded, an interrupted run goes on where it stopped, and the switch is one step.

FOLDER/work/<lineage>.sqlite holds vectors by content hash while a build runs; all are deleted when a version is published.
"""

import fcntl
import sqlite3
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedft.encode import Progress
from embedft.errors import DocumentsUnusable, EngineBusy, IndexInvalid, IndexNotFound, UsageError
from embedft.rag.ann import AnnSettings
from embedft.rag.engines import Embedder, Rows
from embedft.rag.index import VectorIndex
from embedft.rag.rows import Chunk
from embedft.rag.versions import current_version, require_ours

BATCH = 256  # chunks between two points that an interrupted run can go on from


@dataclass(frozen=True)
class BuildReport:
    """`embedded`: texts; `reused`: chunks whose vectors are another chunk's of the same text, or came from the version before or from an
    interrupted run; `truncated`: those of the embedded that are too long for the adapter."""

    version: str
    chunks: int
    embedded: int
    reused: int
    truncated: int
    kind: str
    lineage: str
    made_by: str
    seconds: float
    embedding_seconds: float


def build_index(
    folder: Path,
    chunks: Iterable[Chunk],
    embedder: Embedder,
    *,
    adapter: str | None,
    recorded: str | None = None,
    settings: AnnSettings | None = None,
    bm25: bool = True,
    notes: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Index `chunks` as the next version of `folder`. Readers of the version before are not disturbed.

    `recorded`: what the index is to call `adapter`, where that is not its name. Raises DocumentsUnusable where there is no chunk,
    EngineBusy where the adapter is replaced or another build runs, IndexInvalid where `folder` holds something else or a version was
    published meanwhile, UsageError where there can be no folder, OSError where there is no room. All of them leave the old version, and
    what was embedded for a next build.
    """
    began = time.perf_counter()
    listed = list(chunks)
    if not listed:
        raise DocumentsUnusable(["the documents hold no text to index"])
    lineage, made_by = embedder.document_lineage(adapter)
    usable(folder)
    require_ours(folder)
    with _alone(folder):
        version, before = current_version(folder), _opened(folder)  # as it is now: what is published from here on is not replaced
        work = _Work(folder / "work" / f"{lineage[:32]}.sqlite")
        known = before.known() if before is not None and before.lineage == lineage else {}
        missing = {chunk.hash: chunk.whole for chunk in listed if chunk.hash not in known}
        for digest in work.known():
            missing.pop(digest, None)
        started = time.perf_counter()
        truncated = _embed(missing, embedder, adapter, lineage, work, progress)
        spent = time.perf_counter() - started
        index = VectorIndex(folder, lineage=lineage, made_by=made_by, settings=settings, adapter=recorded or adapter)
        index.version, index.notes = version, notes or {}
        for start in range(0, len(listed), 65_536):
            part = listed[start : start + 65_536]
            index.add(part, _gathered(part, known, before, work), lineage=lineage, made_by=made_by)
        version = index.save(bm25=bm25)
        work.delete()
    return BuildReport(
        version=version,
        chunks=len(index),
        embedded=len(missing),
        reused=len(listed) - len(missing),
        truncated=truncated,
        kind=index.kind,
        lineage=lineage,
        made_by=made_by,
        seconds=time.perf_counter() - began,
        embedding_seconds=spent,
    )


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """The only build in `folder`. EngineBusy where another is under way, OSError where the disk takes no more, SQLite's word for it too."""
    with (folder / ".building").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EngineBusy(f"another process is indexing into {folder}: wait for its end, or name another folder") from None
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"{folder} cannot be written: {error}") from None


def usable(folder: Path) -> None:
    """Make `folder` unless it is there. UsageError where nothing can be written in it: said before hours of work, not after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{folder}: no folder can be made or written to there ({error.strerror}): name another") from None


def _opened(folder: Path) -> VectorIndex | None:
    """The version before, whose vectors may be used again; None where there is none, or a damaged one."""
    try:
        return VectorIndex.open(folder, verify=True)
    except (IndexNotFound, IndexInvalid):
        return None


def _embed(missing: dict[str, str], embedder: Embedder, adapter: str | None, lineage: str, work: "_Work", progress: Progress | None) -> int:
    order = sorted(missing, key=lambda digest: -len(missing[digest]))  # like lengths together: little padding, and memory fails early
    truncated = 0
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        made = embedder.embed([missing[digest] for digest in part], input_type="document", adapter=adapter)
        if made.lineage != lineage:
            raise EngineBusy(f"adapter {adapter!r} was replaced while documents were embedded with it: index again")
        truncated += made.truncated
        work.keep(part, made.rows)
        if progress:
            progress(min(start + BATCH, len(order)), len(order))
    return truncated


def _gathered(part: Sequence[Chunk], known: dict[str, int], before: VectorIndex | None, work: "_Work") -> Rows:
    """(len(part), d): from the version before where its content is known there, else from this build's work."""
    made: list[Rows | None] = [None] * len(part)
    old = [place for place, chunk in enumerate(part) if chunk.hash in known]
    if before is not None and old:
        for place, row in zip(old, before.vectors(np.array([known[part[place].hash] for place in old])), strict=True):
            made[place] = row
    for place, chunk in enumerate(part):
        if made[place] is None:
            made[place] = work.vector(chunk.hash)
    return np.stack([row for row in made if row is not None])


class _Work:
    """Vectors by content hash; what was kept before a crash is still there."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._db = path, sqlite3.connect(str(path))
        self._db.execute("CREATE TABLE IF NOT EXISTS vector (hash TEXT PRIMARY KEY, row BLOB NOT NULL)")

    def known(self) -> list[str]:
        return [digest for (digest,) in self._db.execute("SELECT hash FROM vector")]

    def keep(self, digests: Sequence[str], rows: Rows) -> None:
        packed = [(digest, row.astype("<f4").tobytes()) for digest, row in zip(digests, rows, strict=True)]
        self._db.executemany("INSERT OR REPLACE INTO vector VALUES (?, ?)", packed)
        self._db.commit()

    def vector(self, digest: str) -> Rows:
        (packed,) = self._db.execute("SELECT row FROM vector WHERE hash = ?", (digest,)).fetchone()
        return np.frombuffer(packed, dtype="<f4")

    def delete(self) -> None:
        """And what other builds have left here: the version that was published has taken their place."""
        self._db.close()
        for path in self._path.parent.iterdir():
            path.unlink(missing_ok=True)
