"""What RAG costs beside its engines: indexing, a question from its vector to its chunks, and the same over HTTP.

    python benchmarks/rag.py indexing|overhead|http --data ../shared/data --work runs/rag

Each part adds its figures to benchmarks/results/rag.json, with the machine they were measured on. FAISS' kinds alone: rag_indexes.py;
what is found and answered: rag_docs.py.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.rag_record import ROOT, K, percentiles, record, synthetic, timed
from embedft.rag.ann import AnnSettings
from embedft.rag.engines import Labelled
from embedft.rag.index import VectorIndex
from embedft.rag.rows import Chunk
from embedft.rag.search import Stages, search

WORDS = 20_000


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


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"indexing": indexing_part, "overhead": overhead_part, "http": http_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "rag")
    given = parser.parse_args()
    figures = PARTS[given.part](given.data, given.work)
    record(given.part, figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
