"""An index on disk: vectors of one lineage, the chunks behind them, BM25. Refuses vectors of another lineage; knows no llama-index.

FOLDER/versions/<version>/    meta.json, vectors.faiss, rows.sqlite, bm25/ (versions.py says which is current)
FOLDER/maps/<lineage>.npz     fitted linear maps from other lineages
"""

import copy
import shutil
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from embedft.errors import IndexInvalid, IndexNotFound, LineageMismatch, UsageError
from embedft.rag.ann import BLOCK, Ann, AnnSettings, Dead, Kind
from embedft.rag.engines import Labelled, Rows
from embedft.rag.linear_map import LinearMap
from embedft.rag.rows import Chunk, RowTable
from embedft.rag.sparse import Bm25
from embedft.rag.versions import Meta, current_version, publish, read_meta, require_ours, write_meta
from embedft.vectors import unit

MOST_DEAD, MOST_NEW = 0.2, 0.5  # shares of the rows beyond which a graph is built anew rather than added to


@dataclass(frozen=True)
class Found:
    """A chunk and its score: its cosine with the query, unless a later stage has put its own in its place."""

    row: int
    score: float
    chunk: Chunk


class VectorIndex:
    """A version of an index, opened from disk or new, with what has been added and deleted since; `save` publishes the next version.

    Threads may search while another adds, deletes or saves: each of several steps of one search goes to one `snapshot`.
    """

    def __init__(
        self, folder: Path, *, lineage: str, made_by: str, settings: AnnSettings | None = None, adapter: str | None = None
    ) -> None:
        """A new, empty index; nothing is written before `save`."""
        self.folder, self.lineage, self.made_by, self.adapter = folder, lineage, made_by, adapter
        self.settings = settings or AnnSettings()
        self.notes: dict[str, Any] = {}
        self.version: str | None = None
        self.bm25: Bm25 | None = None
        self._ann: Ann | None = None
        self._new: list[Rows] = []
        self._table, self._own_table = RowTable(None, writable=True), True
        self._dead = Dead(np.zeros(0, dtype=np.int64), sealed=0)
        self._lock = threading.RLock()  # of those who change it, for as long as that takes
        self._turn = threading.Lock()  # of all, for the moment in which one state takes another's place

    @property
    def name(self) -> str:
        return self.folder.name

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> "VectorIndex":
        """The current version, memory-mapped. `verify` also reads every byte. Raises IndexNotFound, IndexInvalid."""
        require_ours(folder)
        version = current_version(folder)
        if version is None:
            raise IndexNotFound(str(folder))
        place = folder / "versions" / version
        meta = read_meta(place, folder.name, verify=verify)
        index = cls(folder, lineage=meta.lineage, made_by=meta.made_by, settings=AnnSettings(**meta.settings), adapter=meta.adapter)
        index.version, index.notes = version, dict(meta.notes)
        try:
            index._table, index._own_table = RowTable(place / "rows.sqlite"), False
            index._dead = Dead(index._table.dead(), sealed=meta.rows)
            if index._table.count() != meta.chunks:
                raise IndexInvalid(folder.name, f"rows.sqlite holds {index._table.count()} chunks, its record says {meta.chunks}")
        except sqlite3.DatabaseError as error:
            raise IndexInvalid(folder.name, f"rows.sqlite cannot be read ({error}): index again") from None
        if meta.rows:
            index._ann = Ann.load(place, meta.kind, index.settings, rows=meta.rows, dimension=meta.dimension, name=folder.name)
        if meta.bm25:
            try:
                index.bm25 = Bm25.load(place / "bm25")
            except (ValueError, KeyError, TypeError, EOFError) as error:
                raise IndexInvalid(folder.name, f"bm25 cannot be read ({str(error)[:100]}): index again") from None
        return index

    @property
    def dimension(self) -> int | None:
        """None while the index is empty."""
        return self._ann.dimension if self._ann else self._new[0].shape[1] if self._new else None

    @property
    def kind(self) -> Kind:
        return self._ann.kind if self._ann else "flat"

    def __len__(self) -> int:
        return self._table.count()

    def snapshot(self) -> "VectorIndex":
        """What it is now, to search in: later changes do not reach it, but for chunks that are deleted, which it no longer finds."""
        with self._turn:
            return copy.copy(self)

    def check(self, *, lineage: str, made_by: str) -> None:
        """LineageMismatch unless vectors that are to be compared with documents of `lineage` belong here."""
        if lineage != self.lineage:
            raise LineageMismatch(self.name, holds=self.lineage, holds_by=self.made_by, given=lineage, given_by=made_by)

    def add(self, chunks: Sequence[Chunk], vectors: Rows, *, lineage: str, made_by: str) -> None:
        """(n,) chunks with (n, d) vectors of `lineage`, of which only the direction is kept. An id that is there already is replaced.

        Raises LineageMismatch, IndexInvalid.
        """
        self.check(lineage=lineage, made_by=made_by)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if len(vectors) != len(chunks) or vectors.ndim != 2:
            raise IndexInvalid(self.name, f"{vectors.shape} vectors for {len(chunks)} chunks")
        vectors = unit(vectors)
        if self.dimension not in (None, vectors.shape[1]):
            raise IndexInvalid(self.name, f"it holds vectors of {self.dimension} dimensions, and these have {vectors.shape[1]}")
        last = {chunk.id: place for place, chunk in enumerate(chunks)}  # an id twice in one call: the last one counts
        kept = sorted(last.values())
        with self._lock:
            self._writable()
            with self._turn:
                self._table.add(self._rows(), [chunks[place] for place in kept])
                self._new = _joined([*self._new, vectors[kept]])
                self._bury()

    def delete(self, *, ids: Sequence[str] = (), document: str | None = None) -> int:
        """Forget chunks by id, or all of a document; returns how many there were."""
        with self._lock:
            self._writable()
            rows = self._table.find(list(ids)) + (self._table.of_document(document) if document is not None else [])
            with self._turn:
                self._table.drop(rows)
                self._bury()
        return len(rows)

    def _bury(self) -> None:
        self._dead = Dead(self._table.dead(), sealed=self._ann.rows if self._ann else 0)

    def search(self, query: Labelled, k: int, *, mapped: bool = False) -> list[Found]:
        """The k chunks nearest to one query. `mapped`: a query of another lineage goes through its fitted linear map.

        Raises LineageMismatch, or IndexInvalid on a dimension mismatch.
        """
        now = self.snapshot()
        return now.found(now.nearest(now.accept(query, mapped=mapped), k))

    def by_words(self, text: str, k: int) -> list[tuple[int, float]]:
        """(row, BM25 score) of the k best live rows. UsageError where it was made without BM25, or holds what was not saved yet."""
        made_without = self._ann is not None and self.bm25 is None
        if (made_without or self._new) and len(self):
            why = "was made without BM25: index again with it" if made_without else "has new chunks without BM25 until it is saved: save it"
            raise UsageError(f"index {self.name!r} {why}, or turn the hybrid stage off")
        found = self.bm25.search(text, k + len(self._dead.rows)) if self.bm25 else []
        return [pair for pair in found if pair[0] not in self._dead][:k]

    def accept(self, query: Labelled, *, mapped: bool = False) -> Rows:
        """The query as a vector of this index, (d,). Raises as `search` does."""
        vector = np.asarray(query, dtype=np.float32)
        if query.documents != self.lineage and mapped and (found := self.map_from(query.documents)) is not None:
            vector = found.apply(vector)
        else:
            self.check(lineage=query.documents, made_by=query.made_by)
        if self.dimension not in (None, len(vector)):
            raise IndexInvalid(self.name, f"it holds vectors of {self.dimension} dimensions, and the query has {len(vector)}")
        return vector

    def found(self, scored: Sequence[tuple[int, float]]) -> list[Found]:
        """(row, score) pairs with their chunks, in the same order; rows that are dead are left out."""
        chunks = self._table.get([row for row, _ in scored])
        return [Found(row, score, chunks[row]) for row, score in scored if row in chunks]

    def chunk(self, row: int) -> Chunk | None:
        return self._table.get([row]).get(row)

    def chunks(self, ids: Sequence[str]) -> list[Chunk]:
        return list(self._table.get(self._table.find(list(ids))).values())

    def documents(self) -> list[str]:
        return self._table.documents()

    def rows(self) -> NDArray[np.int64]:
        """The row numbers in use."""
        return self._table.live()

    def known(self) -> dict[str, int]:
        """Content hash → row."""
        return self._table.hashes()

    def vectors(self, rows: NDArray[np.int64]) -> Rows:
        """(n,) row numbers → (n, d) exact vectors."""
        first = self._ann.rows if self._ann else 0
        made = np.zeros((len(rows), self.dimension or 0), dtype=np.float32)
        old = rows < first
        if self._ann and old.any():
            made[old] = self._ann.vectors(rows[old])
        for part in self._new:
            here = (rows >= first) & (rows < first + len(part))
            made[here] = part[rows[here] - first]
            first += len(part)
        return made

    def map_from(self, lineage: str) -> LinearMap | None:
        """The fitted map from another lineage's documents to this one's, if there is one; a damaged one can be fitted again."""
        path = self.folder / "maps" / f"{lineage[:32]}.npz"
        try:
            found = LinearMap.load(path)
        except (FileNotFoundError, ValueError, KeyError, EOFError, BadZipFile):
            return None
        return found if (found.source, found.target) == (lineage, self.lineage) else None

    def save(self, *, bm25: bool = True) -> str:
        """Publish what is in memory as the next version and switch to it in one step. Returns the version's name.

        IndexInvalid where another process has published since this one was opened.
        """
        with self._lock:
            version = publish(self.folder, lambda stage: self._write(stage, bm25=bm25), before=self.version, lineage=self.lineage)
            opened = VectorIndex.open(self.folder)
            with self._turn:
                self.__dict__.update({name: value for name, value in opened.__dict__.items() if name not in ("_lock", "_turn")})
        return version

    def _write(self, stage: Path, *, bm25: bool) -> None:
        live, rows = self._table.live(), self._rows()
        ann = self._grown(rows, len(live))
        renumbered = None if ann else live
        if ann is None and len(live):
            ann = Ann.build(self._gathered(live, stage), self.settings)
        self._table.copy_to(stage / "rows.sqlite", renumbered=renumbered)
        if ann:
            ann.save(stage)
        (stage / "gathered.f32").unlink(missing_ok=True)
        table = RowTable(stage / "rows.sqlite")
        sparse = Bm25.build(table.texts()) if bm25 and len(live) else None
        table.close()
        if sparse:
            (stage / "bm25").mkdir()
            sparse.save(stage / "bm25")
        meta = Meta(
            lineage=self.lineage,
            made_by=self.made_by,
            adapter=self.adapter,
            dimension=self.dimension or 0,
            rows=ann.rows if ann else 0,
            chunks=len(live),
            kind=ann.kind if ann else "flat",
            settings=asdict(self.settings),
            bm25=sparse is not None,
            notes=self.notes,
        )
        write_meta(stage, meta)

    def _grown(self, rows: int, live: int) -> Ann | None:
        """The graph or lists as they are, with the new rows added, where few rows are new or dead; None: build anew."""
        ann, new = self._ann, sum(map(len, self._new))
        worthwhile = ann is not None and ann.kind != "flat" and ann.kind == self.settings.chosen(live)
        if ann is None or not worthwhile or len(self._dead.rows) > MOST_DEAD * rows or new > MOST_NEW * rows or self.version is None:
            return None
        import faiss

        index: Any = faiss.read_index(str(self.folder / "versions" / self.version / "vectors.faiss"))
        raw = np.concatenate([ann.raw, *self._new]) if ann.raw is not None else None
        for vectors in self._new:
            index.add(vectors)
        return Ann(index, ann.kind, self.settings, raw)

    def _gathered(self, live: NDArray[np.int64], stage: Path) -> Rows:
        """The live vectors in a file of their own: a million of them need not be in memory twice."""
        made = np.memmap(stage / "gathered.f32", dtype=np.float32, mode="w+", shape=(len(live), self.dimension or 0))
        for start in range(0, len(live), BLOCK):
            made[start : start + BLOCK] = self.vectors(live[start : start + BLOCK])
        return made

    def nearest(self, vector: Rows, k: int) -> list[tuple[int, float]]:
        """(row, cosine) of the k live rows nearest to a (d,) vector whose lineage the caller has checked, best first."""
        vector = unit(vector)
        found: list[tuple[int, float]] = []
        if self._ann:
            sealed = self._ann.rows
            scores, rows = self._ann.search(vector[None], min(k, sealed), over=self._dead.over)
            found = [(int(row), float(score)) for row, score in zip(rows[0], scores[0], strict=True) if row >= 0]
        if not self._new:
            return found
        scores, first = np.concatenate([part @ vector for part in self._new]), self._ann.rows if self._ann else 0
        scores[self._dead.rows[self._dead.rows >= first] - first] = -np.inf
        best = np.argsort(-scores, kind="stable")[:k]
        found += [(first + int(row), float(scores[row])) for row in best if np.isfinite(scores[row])]
        return sorted(found, key=lambda pair: -pair[1])[:k]

    def _rows(self) -> int:
        return (self._ann.rows if self._ann else 0) + sum(map(len, self._new))

    def _writable(self) -> None:
        if self._own_table:
            return
        own = Path(tempfile.mkdtemp(prefix="embedft-rows-")) / "rows.sqlite"
        self._table.copy_to(own)
        self._table, self._own_table = RowTable(own, writable=True), True
        weakref.finalize(self._table, shutil.rmtree, own.parent, ignore_errors=True)  # SQLite does not write to an unlinked file


def _joined(parts: list[Rows]) -> list[Rows]:
    """Few parts however many were added: a short last part is put together with the one before it that is no longer."""
    while len(parts) > 1 and len(parts[-2]) <= len(parts[-1]) < BLOCK:
        parts[-2:] = [np.concatenate(parts[-2:])]
    return parts
