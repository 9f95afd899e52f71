"""What stands behind each vector: one SQLite file, a row a chunk, addressed by the vector's row number. Knows no vectors."""

import hashlib
import json
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk (row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, document TEXT NOT NULL,
    hash TEXT NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL, embedded TEXT);
CREATE INDEX IF NOT EXISTS chunk_document ON chunk (document);
CREATE TABLE IF NOT EXISTS dead (row INTEGER PRIMARY KEY);
"""


@dataclass(frozen=True)
class Chunk:
    """A piece of a document. `embedded`: what the vector is made of, where that is more than the text (headings before it)."""

    id: str
    document: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    embedded: str | None = None

    @property
    def whole(self) -> str:
        """What the vector is made of, and what a reranker reads."""
        return self.embedded or self.text

    @property
    def hash(self) -> str:
        """sha256 (64 hex) of `whole`: equal hashes under one lineage have equal vectors."""
        return hashlib.sha256(self.whole.encode()).hexdigest()


class RowTable:
    """`path` None keeps it in memory. Without `writable` the file is taken as unchangeable. Safe to share between threads.

    It closes when nobody holds it any more: SQLite crashes where one thread closes what another reads.
    """

    def __init__(self, path: Path | None, *, writable: bool = False) -> None:
        if path is None or writable:
            self._db = sqlite3.connect(str(path) if path else ":memory:", check_same_thread=False)
            self._db.executescript(_SCHEMA)
            self._db.execute("PRAGMA journal_mode=MEMORY")
            self._db.execute("PRAGMA synchronous=OFF")  # whole files are published after an fsync; a crash loses only the staged one
        else:
            self._db = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True, check_same_thread=False)
            self._db.execute("PRAGMA mmap_size=1073741824")
        weakref.finalize(self, self._db.close)

    def add(self, first: int, chunks: Sequence[Chunk]) -> None:
        """Rows first, first + 1, …; an id that is there already is replaced, its old row is dead."""
        self.drop(self.find([chunk.id for chunk in chunks]))
        values = [
            (first + place, chunk.id, chunk.document, chunk.hash, chunk.text, _json(chunk.metadata), chunk.embedded)
            for place, chunk in enumerate(chunks)
        ]
        self._db.executemany("INSERT INTO chunk VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        self._db.commit()

    def drop(self, rows: Iterable[int]) -> None:
        gone = [(int(row),) for row in rows]
        self._db.executemany("DELETE FROM chunk WHERE row = ?", gone)
        self._db.executemany("INSERT OR IGNORE INTO dead VALUES (?)", gone)
        self._db.commit()

    def find(self, ids: Sequence[str]) -> list[int]:
        """The rows of those ids that there are."""
        return [row for (row,) in self._listed("SELECT row FROM chunk WHERE id IN ({})", ids)]

    def of_document(self, document: str) -> list[int]:
        return [row for (row,) in self._db.execute("SELECT row FROM chunk WHERE document = ?", (document,))]

    def get(self, rows: Sequence[int]) -> dict[int, Chunk]:
        """Row number → its chunk; rows that are dead are left out."""
        found = self._listed("SELECT row, id, document, text, metadata, embedded FROM chunk WHERE row IN ({})", [int(row) for row in rows])
        return {row: Chunk(identity, document, text, json.loads(data), embedded) for row, identity, document, text, data, embedded in found}

    def texts(self) -> Iterator[tuple[int, str]]:
        """(row, text) in the order of rows."""
        yield from self._db.execute("SELECT row, text FROM chunk ORDER BY row")

    def hashes(self) -> dict[str, int]:
        """Content hash → a row that has it."""
        return dict(self._db.execute("SELECT hash, row FROM chunk"))

    def documents(self) -> list[str]:
        return [document for (document,) in self._db.execute("SELECT DISTINCT document FROM chunk ORDER BY document")]

    def live(self) -> NDArray[np.int64]:
        return np.fromiter((row for (row,) in self._db.execute("SELECT row FROM chunk ORDER BY row")), dtype=np.int64)

    def dead(self) -> NDArray[np.int64]:
        return np.fromiter((row for (row,) in self._db.execute("SELECT row FROM dead ORDER BY row")), dtype=np.int64)

    def count(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM chunk").fetchone()[0])

    def copy_to(self, path: Path, *, renumbered: NDArray[np.int64] | None = None) -> None:
        """A copy at `path`; `renumbered` lists the live rows in their new order, and the dead are forgotten."""
        copy = sqlite3.connect(str(path))
        self._db.backup(copy)
        if renumbered is not None:
            copy.execute("DELETE FROM dead")
            copy.execute("CREATE TEMP TABLE moved (old INTEGER PRIMARY KEY, new INTEGER)")
            copy.executemany("INSERT INTO moved VALUES (?, ?)", ((int(old), new) for new, old in enumerate(renumbered)))
            copy.execute("UPDATE chunk SET row = -1 - (SELECT new FROM moved WHERE old = chunk.row)")  # below 0 no number is taken
            copy.execute("UPDATE chunk SET row = -1 - row")
        copy.commit()
        copy.close()

    def close(self) -> None:
        self._db.close()

    def _listed(self, query: str, values: Sequence[Any]) -> Iterator[Any]:
        for start in range(0, len(values), 500):
            part = values[start : start + 500]
            yield from self._db.execute(query.format(",".join("?" * len(part))), part)


def _json(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, ensure_ascii=False, default=str)
