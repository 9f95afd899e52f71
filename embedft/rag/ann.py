"""FAISS indexes of three kinds over rows 0 … n-1: inner product, so cosine for vectors of length 1. Knows no lineage and no text."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedft.errors import IndexInvalid
from embedft.rag.engines import Rows

Kind = Literal["flat", "hnsw", "ivfpq"]
KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivfpq")
TRAINING_POINTS = 39  # a centroid, FAISS' own minimum before it warns
BLOCK = 65_536  # rows read or added at a time


@dataclass(frozen=True)
class AnnSettings:
    """`kind` auto: flat up to 20,000 rows, HNSW above. HNSW: arXiv 1603.09320. IVF-PQ: Jégou et al. 2011;
    then `refine` × k finds are re-scored exactly.

    `lists` 0: about 4·√n. `probes` 0: a sixteenth of the lists, at least 16. `pieces` 0: a code for every 4 dimensions; of `bits` 8
    that is 1/16 of float32.
    """

    kind: Literal["auto", "flat", "hnsw", "ivfpq"] = "auto"
    links: int = 32
    ef_construction: int = 80
    ef_search: int = 96
    lists: int = 0
    probes: int = 0
    pieces: int = 0
    bits: int = 8
    refine: int = 8

    @property
    def fewest(self) -> int:
        """Rows that the product quantizer needs to be trained on."""
        return TRAINING_POINTS * 2**self.bits

    def chosen(self, rows: int) -> Kind:
        """What is built for so many rows; IVF-PQ needs enough to train on, and is flat below."""
        if self.kind == "ivfpq" and rows < self.fewest:
            return "flat"
        if self.kind == "auto":
            return "flat" if rows <= 20_000 else "hnsw"
        return self.kind


class Ann:
    """A FAISS index, searched as its kind needs. `raw` (n, d): the exact vectors by which IVF-PQ's finds are re-scored."""

    def __init__(self, index: Any, kind: Kind, settings: AnnSettings, raw: Rows | None = None) -> None:
        self.index, self.settings, self.raw = index, settings, raw
        self.kind: Kind = kind

    @classmethod
    def build(cls, vectors: Rows, settings: AnnSettings, *, seed: int = 7) -> "Ann":
        """(n, d) → an index of its rows. `vectors` may be a memory map: it is read in blocks."""
        import faiss

        rows, dimension = vectors.shape
        kind, raw = settings.chosen(rows), None
        index: Any
        if kind == "flat":
            index = faiss.IndexFlatIP(dimension)
        elif kind == "hnsw":
            index = faiss.IndexHNSWFlat(dimension, settings.links, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = settings.ef_construction
        else:
            lists = settings.lists or max(1, min(int(4 * rows**0.5), rows // TRAINING_POINTS))
            pieces = _divisor(dimension, settings.pieces or max(1, dimension // 4))
            index = faiss.index_factory(dimension, f"IVF{lists},PQ{pieces}x{settings.bits}", faiss.METRIC_INNER_PRODUCT)
            index.do_polysemous_training = False  # orders the codes by simulated annealing, for a search that is not used here
            sample = np.random.default_rng(seed).choice(rows, size=min(rows, max(lists * TRAINING_POINTS, settings.fewest)), replace=False)
            index.train(np.ascontiguousarray(vectors[np.sort(sample)], dtype=np.float32))
            raw = vectors
        for start in range(0, rows, BLOCK):
            index.add(np.ascontiguousarray(vectors[start : start + BLOCK], dtype=np.float32))
        return cls(index, kind, settings, raw)

    @property
    def rows(self) -> int:
        return int(self.index.ntotal)

    @property
    def dimension(self) -> int:
        return int(self.index.d)

    def search(self, queries: Rows, k: int, *, over: Any = None) -> tuple[Rows, NDArray[np.int64]]:
        """(q, d) → (scores, row numbers), both (q, k), best first, -1 where there are fewer. `over`: of a Dead."""
        import faiss

        queries = np.ascontiguousarray(queries, dtype=np.float32)
        options: dict[str, Any] = {} if over is None else {"sel": over}
        if self.kind == "hnsw":
            wanted: Any = faiss.SearchParametersHNSW(efSearch=max(self.settings.ef_search, 2 * k), **options)  # pyright: ignore[reportAttributeAccessIssue]
            return self.index.search(queries, k, params=wanted)
        if self.kind == "ivfpq":
            wanted = faiss.SearchParametersIVF(nprobe=self.settings.probes or max(16, self.index.nlist // 16), **options)  # pyright: ignore[reportCallIssue]
            return self._exact(queries, self.index.search(queries, k * self.settings.refine, params=wanted)[1], k)
        return self.index.search(queries, k, params=faiss.SearchParameters(**options) if options else None)

    def _exact(self, queries: Rows, found: NDArray[np.int64], k: int) -> tuple[Rows, NDArray[np.int64]]:
        assert self.raw is not None
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        for number, query in enumerate(queries):
            candidates = found[number][found[number] >= 0]
            exact = np.asarray(self.raw[candidates]) @ query
            best = np.argsort(-exact, kind="stable")[:k]
            scores[number, : len(best)], rows[number, : len(best)] = exact[best], candidates[best]
        return scores, rows

    def vectors(self, rows: NDArray[np.int64]) -> Rows:
        """(n,) row numbers → their exact vectors, (n, d)."""
        if not len(rows):
            return np.zeros((0, self.dimension), dtype=np.float32)
        if self.raw is not None:
            return np.asarray(self.raw[rows], dtype=np.float32)
        return self.index.reconstruct_batch(np.ascontiguousarray(rows, dtype=np.int64))

    def save(self, folder: Path) -> None:
        """Write vectors.faiss, and vectors.f32 where the index alone has lost them."""
        import faiss

        faiss.write_index(self.index, str(folder / "vectors.faiss"))
        if self.raw is not None:
            with (folder / "vectors.f32").open("wb") as file:
                for start in range(0, len(self.raw), BLOCK):
                    file.write(np.ascontiguousarray(self.raw[start : start + BLOCK], dtype="<f4").tobytes())

    @classmethod
    def load(cls, folder: Path, kind: Kind, settings: AnnSettings, *, rows: int, dimension: int, name: str) -> "Ann":
        """Memory-mapped. IndexInvalid where the files are damaged or hold another number of rows or dimensions."""
        import faiss

        path = folder / "vectors.faiss"
        try:
            index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise IndexInvalid(name, f"{path.name} cannot be read ({str(error).splitlines()[0][-120:]}): index again") from None
        if index.ntotal != rows or index.d != dimension:
            found = f"{index.ntotal} vectors of {index.d} dimensions"
            raise IndexInvalid(name, f"{path.name} holds {found}, its record says {rows} of {dimension}: index again")
        raw = None
        if kind == "ivfpq":
            exact = folder / "vectors.f32"
            if not exact.is_file() or exact.stat().st_size != rows * dimension * 4:
                raise IndexInvalid(name, f"{exact.name} is missing or of the wrong size: index again")
            raw = np.memmap(exact, dtype="<f4", mode="r", shape=(rows, dimension))
        return cls(index, kind, settings, raw)


class Dead:
    """`rows` (n,) that are passed over, of which an Ann holds those below `sealed`."""

    def __init__(self, rows: NDArray[np.int64], *, sealed: int) -> None:
        self.rows, self._sealed = rows, sealed

    def __contains__(self, row: int) -> bool:
        return row in self._known

    @cached_property
    def _known(self) -> frozenset[int]:
        return frozenset(self.rows.tolist())

    @cached_property
    def over(self) -> Any:
        """What an Ann's `search` takes to leave them out; None where all of its rows live. Made once: it takes time in proportion."""
        import faiss

        held = self.rows[self.rows < self._sealed]
        return faiss.IDSelectorNot(faiss.IDSelectorBatch(held)) if len(held) else None


def _divisor(dimension: int, wanted: int) -> int:
    """The largest divisor of `dimension` that is not above `wanted`."""
    return next(size for size in range(wanted, 0, -1) if dimension % size == 0)
