"""What RAG costs and finds: FAISS kinds on medquad, the time of a query outside the engines, a million vectors.

    python benchmarks/rag.py faiss|indexing|overhead|http|million --data ../shared/data --work runs/rag

Each part adds its figures to benchmarks/results/rag.json, with the machine they were measured on. Parts that measure memory or time of
their own run in a fresh process each. Vectors that take long to make are kept under --work.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rag.json"
sys.path.insert(0, str(ROOT))

from embedft.rag.ann import Ann, AnnSettings  # noqa: E402
from embedft.rag.engines import Labelled, Rows  # noqa: E402
from embedft.rag.index import VectorIndex  # noqa: E402
from embedft.rag.rows import Chunk  # noqa: E402
from embedft.rag.search import Stages, search  # noqa: E402

K = 10


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{q}_ms": float(np.percentile(seconds, q)) * 1e3 for q in (50, 95)}


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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


# --- Indexing, against the embedding engine alone


def indexing_part(data: Path, work: Path, *, rounds: int = 2) -> dict[str, Any]:
    """Files to a published index, and the same chunks through the engine in one call; in turns, so that the machine's moods meet both."""
    from embedft.base import BaseSpec
    from embedft.rag.build import build_index
    from embedft.rag.chunks import Chunking, chunks_of
    from embedft.rag.documents import read_documents
    from embedft.rag.local import LocalEmbedder

    engine, source = LocalEmbedder(BaseSpec("minilm")), data / "docs" / "docs_starlette"
    texts = [chunk.embedded or chunk.text for chunk in chunks_of(read_documents(source).documents, Chunking())]
    engine.embed(texts[:64], input_type="document", adapter=None)
    spent: dict[str, list[float]] = {"engine": [], "indexing": []}

    def index(place: Path) -> None:
        build_index(place, chunks_of(read_documents(source).documents, Chunking()), engine, adapter=None)

    for number in range(rounds):
        spent["engine"].append(timed(lambda: engine.embed(texts, input_type="document", adapter=None)))
        with tempfile.TemporaryDirectory(dir=work) as place:
            spent["indexing"].append(timed(lambda place=place, number=number: index(Path(place) / str(number))))
    rates = {name: len(texts) / min(seconds) for name, seconds in spent.items()}
    return {
        "data": source.name,
        "chunks": len(texts),
        "distinct": len(set(texts)),
        "seconds": spent,
        "engine_chunks_per_second": rates["engine"],
        "indexing_chunks_per_second": rates["indexing"],
        "indexing_of_engine": rates["indexing"] / rates["engine"],
        "target": 0.9,
    }


# --- A query's time outside the engines


WORDS = 20_000


def synthetic(rows: int, dimension: int = 384, *, seed: int = 7) -> Rows:
    """(rows, dimension) of length 1, in 1,000 clusters: neither as easy as noise nor as real as text."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((1000, dimension)).astype(np.float32)
    made = np.empty((rows, dimension), dtype=np.float32)
    for start in range(0, rows, 50_000):
        count = min(50_000, rows - start)
        block = centres[random.integers(1000, size=count)] + random.standard_normal((count, dimension), dtype=np.float32)
        made[start : start + count] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return made


def overhead_part(data: Path, work: Path, *, rows: int = 100_000) -> dict[str, Any]:  # noqa: ARG001
    """From a query's vector to the chunks with their texts, on 100,000 vectors; and what HTTP adds, over an engine that answers at once."""
    import faiss

    faiss.omp_set_num_threads(1)
    random = np.random.default_rng(3)
    vocabulary = np.array([f"word{i}" for i in range(WORDS)])
    texts = [" ".join(vocabulary[row]) for row in (random.zipf(1.3, size=(rows, 60)) % WORDS)]
    vectors = synthetic(rows)
    folder = work / "overhead"
    index = VectorIndex(folder, lineage="L", made_by="base", settings=AnnSettings(kind="hnsw"))
    if not (folder / "current").exists():
        for start in range(0, rows, 20_000):
            part = [Chunk(f"c{i}", f"d{i // 10}", texts[i]) for i in range(start, min(rows, start + 20_000))]
            index.add(part, vectors[start : start + len(part)], lineage="L", made_by="base")
        index.save()
    index = VectorIndex.open(folder)
    questions = [" ".join(vocabulary[random.integers(50, WORDS, size=8)]) for _ in range(300)]
    labels = {"lineage": "L", "documents": "L", "made_by": "base"}
    asked = vectors[random.integers(rows, size=300)] + 0.02 * random.standard_normal((300, 384), dtype=np.float32)
    queries = [Labelled(row.tolist(), **labels) for row in asked]
    shown: dict[str, Any] = {"rows": rows, "dimension": 384, "kind": index.kind, "queries": len(queries), "threads": 1}
    for name, stages in (("dense", Stages()), ("hybrid_rrf", Stages(fusion="rrf"))):
        for question, query in zip(questions[:20], queries[:20], strict=True):
            search(index, question, query, stages)
        times = [timed(lambda q=q, v=v, s=stages: search(index, q, v, s)) for q, v in zip(questions, queries, strict=True)]
        shown[name] = percentiles(times)
    exact = np.argsort(-(asked @ vectors.T), axis=1)[:, :K]
    found = [[hit.row for hit in index.search(query, K)] for query in queries]
    shown["recall_against_exact"] = float(np.mean([len(set(a) & set(b)) / K for a, b in zip(exact.tolist(), found, strict=True)]))
    return shown


# --- The same over HTTP


def http_part(data: Path, work: Path) -> dict[str, Any]:  # noqa: ARG001
    """/v1/rag/{index}/query for its sources over 100,000 vectors, against /v1/embeddings of the same question: engine without a model."""
    from tests.serve import world as tests_world

    tests_world.DIMENSION = 384
    with tempfile.TemporaryDirectory(prefix="rag-http-") as home:
        made = tests_world.make_world(Path(home))
        (Path(home) / "indexes").mkdir()
        server = made.start(indexes="indexes")
        try:
            from embedft.rag.remote import RemoteEngine

            engine = RemoteEngine(server.url)
            lineage, made_by = engine.document_lineage("a")
            index = VectorIndex(Path(home) / "indexes" / "big", lineage=lineage, made_by=made_by, adapter="a")
            vectors = synthetic(100_000)
            index.settings = AnnSettings(kind="hnsw")
            index.add([Chunk(f"c{i}", f"d{i // 10}", f"text {i}") for i in range(len(vectors))], vectors, lineage=lineage, made_by=made_by)
            index.save(bm25=False)
            assert server.client.put("/v1/rag/big", json={}, headers=tests_world.ADMIN).status_code == 200
            calls = {
                "rag_query": lambda n: server.post("/v1/rag/big/query", {"question": f"question {n}", "answer": False}),
                "embeddings": lambda n: server.post("/v1/embeddings", {"input": f"question {n}", "adapter": "a", "input_type": "query"}),
            }
            shown: dict[str, Any] = {"rows": len(vectors), "kind": index.kind, "requests": 300, "concurrency": 1}
            times: dict[str, list[float]] = {name: [] for name in calls}
            for number in range(330):  # interleaved, so that other work on the machine meets both alike
                for name, call in calls.items():
                    start = time.perf_counter()
                    assert call(number).status_code == 200
                    times[name].append(time.perf_counter() - start)
            shown |= {name: percentiles(values[30:]) for name, values in times.items()}
            shown["rag_adds_p50_ms"] = shown["rag_query"]["p50_ms"] - shown["embeddings"]["p50_ms"]
            return shown
        finally:
            server.stop()


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


def record(part: str, figures: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "load_1min_at_end": os.getloadavg()[0], "python": platform.python_version()}
    known[part] = {**figures, "machine": machine}
    RESULTS.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "faiss": faiss_part,
    "indexing": indexing_part,
    "overhead": overhead_part,
    "http": http_part,
    "million": million_part,
}


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
