"""What FAISS' kinds find, cost and hold: on medquad, and over a million vectors.

    python benchmarks/rag_indexes.py faiss|million --data ../shared/data --work runs/rag

Each part adds its figures to benchmarks/results/rag.json, and measures memory and time in fresh processes of its own. Vectors that take
long to make are kept under --work.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil

from benchmarks.rag_record import ROOT, K, percentiles, record, synthetic, timed
from embedft.rag.ann import Ann, AnnSettings
from embedft.rag.engines import Labelled, Rows
from embedft.rag.index import VectorIndex
from embedft.rag.rows import Chunk


def resident() -> int:
    return psutil.Process().memory_info().rss


# --- FAISS kinds on medquad


def medquad(data: Path, work: Path, *, max_length: int = 96) -> tuple[Rows, Rows, list[str], list[dict[str, int]]]:
    """(documents, test queries, document ids, relevant documents of each query): MiniLM's vectors of the first `max_length` tokens."""
    from embedft.embedding.beir import read_beir

    beir = read_beir(data / "retrieval" / "medquad", "test", [])
    made: list[Rows] = []
    for name, texts in (("documents", list(beir.documents.values())), ("queries", [beir.queries[q] for q in beir.relevant])):
        path = work / f"medquad_{name}.npy"
        if not path.exists():
            from embedft.base import BaseSpec, load_base
            from embedft.encode import Encoder, EncodeSettings

            base = load_base(BaseSpec("minilm"), task="embedding")
            encoder = Encoder(base.model, base.folder, EncodeSettings(base.info.pooling, base.info.normalize, max_length))
            work.mkdir(parents=True, exist_ok=True)
            np.save(path, encoder.encode(texts))
        made.append(np.load(path))
    return made[0], made[1], list(beir.documents), [dict(relevant) for relevant in beir.relevant.values()]


KINDS_MEASURED = {"flat": (0,), "hnsw": (0,), "ivfpq": (0, 64)}  # and the probes that each is searched with; 0: the default


def faiss_part(data: Path, work: Path) -> dict[str, Any]:
    """Each kind in a process of its own: memory is what opening and searching it adds (nothing, the second time over one file)."""
    rows = [row for kind in KINDS_MEASURED for row in json.loads(child("_faiss_kind", data, work, kind))]
    return {"data": "medquad", "dimension": 384, "max_length": 96, "k": K, "threads": 1, "kinds": rows}


def faiss_kind(data: Path, work: Path, kind: str) -> list[dict[str, Any]]:
    import faiss

    faiss.omp_set_num_threads(1)
    documents, queries, ids, relevant = medquad(data, work)
    exact = Ann.build(documents, AnnSettings(kind="flat")).search(queries, K)[1]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place, settings = Path(folder), AnnSettings(kind=kind)  # type: ignore[arg-type]
        build = timed(lambda: Ann.build(documents, settings).save(place))
        size = {path.name: path.stat().st_size for path in place.iterdir()}
        for probes in KINDS_MEASURED[kind]:
            before = resident()
            chosen, shape = replace(settings, probes=probes), {"rows": len(documents), "dimension": documents.shape[1]}
            ann = Ann.load(place, kind, chosen, **shape, name="medquad")  # type: ignore[arg-type]
            found = ann.search(queries, K)[1]
            times = [timed(lambda query=query, ann=ann: ann.search(query[None], K)) for query in queries[:1000]]
            ranked = [[ids[row] for row in best if row >= 0] for best in found]
            shared = [len(set(a) & set(b)) / K for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
            row = {
                "kind": ann.kind,
                "probes": f"{probes or max(16, ann.index.nlist // 16)} of {ann.index.nlist}" if kind == "ivfpq" else None,
                "documents": len(documents),
                "queries": len(queries),
                "recall_against_exact": float(np.mean(shared)),
                "ndcg@10": float(np.mean([_ndcg(best, wanted) for best, wanted in zip(ranked, relevant, strict=True)])),
                "queries_per_second": len(times) / sum(times),
            }
            row |= {**percentiles(times), "build_seconds": build, "resident_bytes": resident() - before}
            rows.append({**row, "index_bytes": size["vectors.faiss"], "file_bytes": sum(size.values())})
    return rows


def _ndcg(best: Sequence[str], relevant: dict[str, int]) -> float:
    discounts = 1 / np.log2(np.arange(2, K + 2))
    gains = np.array([relevant.get(name, 0) for name in best], dtype=np.float64)
    ideal = np.sort(np.array(list(relevant.values()), dtype=np.float64))[::-1][:K]
    return float(gains @ discounts[: len(gains)] / (ideal @ discounts[: len(ideal)]))


# --- A million vectors


def million_part(data: Path, work: Path) -> dict[str, Any]:
    build = json.loads(child("_million_build", data, work, "ivfpq"))
    return {**build, "serving": json.loads(child("_million_serve", data, work, "ivfpq"))}


def million_build(work: Path, *, rows: int = 1_000_000) -> dict[str, Any]:
    import faiss

    faiss.omp_set_num_threads(1)
    start = time.perf_counter()
    folder = work / "million"
    settings = AnnSettings(kind="ivfpq", lists=1024)
    index = VectorIndex(folder, lineage="L", made_by="synthetic", settings=settings)
    for first in range(0, rows, 100_000):
        part = [Chunk(f"c{i}", f"d{i // 10}", f"text of chunk {i}") for i in range(first, first + 100_000)]
        index.add(part, synthetic(len(part), seed=first), lineage="L", made_by="synthetic")
    index.save(bm25=False)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows": rows, "dimension": 384, "kind": index.kind, "build_seconds": time.perf_counter() - start, "build_peak_bytes": peak} | {
        "file_bytes": size
    }


def million_serve(work: Path) -> dict[str, Any]:
    import faiss

    faiss.omp_set_num_threads(1)
    start = time.perf_counter()
    index = VectorIndex.open(work / "million")
    opened = time.perf_counter() - start
    asked = synthetic(200, seed=0) + 0.02 * np.random.default_rng(1).standard_normal((200, 384), dtype=np.float32)
    queries = [Labelled(row.tolist(), lineage="L", documents="L", made_by="synthetic") for row in asked]
    times = [timed(lambda query=query: index.search(query, K)) for query in queries]
    found = [[hit.row for hit in index.search(query, K)] for query in queries]
    served = resident()
    assert index._ann is not None
    assert index._ann.raw is not None
    raw = index._ann.raw
    scores = np.concatenate([asked @ np.asarray(raw[at : at + 100_000]).T for at in range(0, len(raw), 100_000)], axis=1)
    exact = np.argpartition(-scores, K, axis=1)[:, :K]
    recall = float(np.mean([len(set(a) & set(b)) / K for a, b in zip(exact.tolist(), found, strict=True)]))
    return {"open_seconds": opened, "resident_bytes": served, "recall_against_exact": recall, **percentiles(times)}


def child(part: str, data: Path, work: Path, kind: str) -> str:
    command = [sys.executable, __file__, part, "--data", str(data), "--work", str(work), "--kind", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1]


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"faiss": faiss_part, "million": million_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "_faiss_kind", "_million_build", "_million_serve"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "rag")
    parser.add_argument("--kind", default="flat")
    given = parser.parse_args()
    if given.part == "_faiss_kind":
        print(json.dumps(faiss_kind(given.data, given.work, given.kind)))
    elif given.part == "_million_build":
        print(json.dumps(million_build(given.work)))
    elif given.part == "_million_serve":
        print(json.dumps(million_serve(given.work)))
    else:
        figures = PARTS[given.part](given.data, given.work)
        record(given.part, figures)
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
