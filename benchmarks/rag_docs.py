"""RAG on documentation and on medquad: adapters and query-only adapters, what they find, and what a reader answers from it.

    python benchmarks/rag_docs.py docs|tenants|medquad --data ../shared/data --work runs/rag

Documents are the sections of four projects' documentation without their headings. Training queries are `data synth`'s, made without a
language model from the sections of two thirds of the files. Test queries are the headings of the remaining files' sections. A reader
is asked which name in `code` comes first in a section; its answer is scored exactly. `tenants`: one index of the base's vectors for four
query-only adapters, one a project, against an index for each of four adapters. `medquad`: adapters trained on its own training split,
over a part of its documents. Each writes its part of benchmarks/results/rag.json.
"""

import argparse
import hashlib
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rag_record import ROOT, record
from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec
from embedft.rag.answer import messages_of, sources_of
from embedft.rag.chunks import Chunking, chunks_of
from embedft.rag.documents import Document, read_documents
from embedft.rag.engines import Labelled
from embedft.rag.evaluate import EvaluationSet, Question, evaluate
from embedft.rag.index import VectorIndex
from embedft.rag.local import LocalEmbedder, LocalReader
from embedft.rag.remote import RemoteEngine
from embedft.rag.report import write_report
from embedft.rag.rows import Chunk

SETS = ("typer", "httpx", "starlette", "peft")
HEADING = re.compile(r"\A\s*#{1,6} +(?P<title>.+?) *#*\s*\n(?P<rest>.*)\Z", re.S)
CODE = re.compile(r"(?<!`)`([^`\n]{3,40})`(?!`)")
PASSAGES, ANSWER_TOKENS = 5, 16


@dataclass(frozen=True)
class Section:
    """`code`: the first name in backticks, '' where there is none."""

    id: str
    project: str
    heading: str
    text: str
    code: str
    test: bool

    @property
    def chunk(self) -> Chunk:
        return Chunk(self.id, self.id, self.text)


def sections(data: Path) -> Iterator[Section]:
    """The first chunk of each section that has a telling heading and enough text. A file is for the test or for training, whole."""
    seen = set[tuple[str, str]]()
    for project in SETS:
        for document in read_documents(data / "docs" / f"docs_{project}").documents:
            if document.format != "markdown" or "release" in document.id or "changelog" in document.id.lower():
                continue
            test = hashlib.sha256(f"docs_{project}/{document.id}".encode()).digest()[0] % 3 == 0
            for chunk in chunks_of([Document(document.id, document.text, "markdown")], Chunking(size=120, overlap=0)):
                found = HEADING.match(chunk.text)
                if not found or len(found["rest"].split()) < 15 or len(found["title"]) < 4 or (project, found["rest"]) in seen:
                    continue
                seen.add((project, found["rest"]))
                above = str(chunk.metadata.get("section", "")).rpartition(" / ")[2]
                heading = plain(f"{above}: {found['title']}" if above else found["title"])
                code = CODE.search(found["rest"])
                yield Section(f"{project}-{len(seen)}", project, heading, found["rest"], code[1] if code else "", test)


def plain(heading: str) -> str:
    """Without Markdown: links keep their text."""
    return " ".join(re.sub(r"\]\(.*?\)|[`*_\[\]]|\{.*?\}|[^\x00-\x7f]", "", heading).split())


def synthetic(listed: Sequence[Section], path: Path) -> dict[str, Any]:
    """Training queries of some sections, by `data synth`; made once."""
    from embedft.embedding.synth import Synth, synthesize

    counts = path.with_suffix(".json")
    if not path.exists():
        corpus = path.with_suffix(".corpus.jsonl")
        write_rows(corpus, [{"_id": one.id, "title": one.heading, "text": one.text} for one in listed])
        made = asdict(synthesize(str(corpus), path, synth=Synth()))
        counts.write_text(json.dumps({key: made[key] for key in ("passages", "made", "kept", "lost", "repeated")}))
    return json.loads(counts.read_text())


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(work: Path, store: AdapterStore, recipe: dict[str, Any]) -> dict[str, Any]:
    """Train what the recipe says, unless it is there, and return its seconds."""
    from embedft.causal_lm.train import train as train_lm
    from embedft.embedding.train import train as train_embedding
    from embedft.recipe_file import load_recipe

    log = work / f"{recipe['name']}.trained.json"
    if not log.exists():
        path = work / f"{recipe['name']}.yaml"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        loaded: Any = load_recipe(str(path), [])
        made: Any = (train_embedding if recipe["task"] == "embedding" else train_lm)(loaded, store=store)
        log.write_text(json.dumps({"seconds": made.seconds, "trainable": made.trainable}))
    return json.loads(log.read_text())


def retriever(name: str, side: str, queries: Path) -> dict[str, Any]:
    return {
        "task": "embedding",
        "name": name,
        "base": {"model": "minilm"},
        "adapter": {"r": 16, "alpha": 32, "side": side},
        "data": {"train": str(queries.resolve())},
        "train": {"epochs": 2, "batch": 32, "lr": 3e-4, "max_length": 128},
        "eval": {"queries": 50},
    }


def questions(listed: Sequence[Section]) -> tuple[Question, ...]:
    return tuple(Question(one.heading, {one.id: 1}) for one in listed)


# --- The matrix


def asked(listed: Sequence[Section]) -> tuple[Question, ...]:
    return tuple(Question(f"{one.heading}: which name in code comes first?", {one.id: 1}, (one.code,)) for one in listed if one.code)


def reader_rows(index: VectorIndex, embedder: LocalEmbedder, listed: Sequence[Question]) -> list[dict[str, Any]]:
    """What a reader sees and should say, with passages as the base finds them; only where the right one is among them."""
    vectors = Labelled.of(embedder.embed([question.text for question in listed], input_type="query", adapter=None))
    rows: list[dict[str, Any]] = []
    for question, vector in zip(listed, vectors, strict=True):
        found = index.search(vector, PASSAGES)
        if any(hit.chunk.document in question.relevant for hit in found):
            rows.append(
                {"messages": [*messages_of(question.text, sources_of(found)), {"role": "assistant", "content": question.answers[0]}]}
            )
    return rows


def matrix_part(data: Path, work: Path) -> dict[str, Any]:
    listed, store = list(sections(data)), AdapterStore(work / "adapters")
    embedder, corpus = LocalEmbedder(BaseSpec("minilm"), store=store), tuple(one.chunk for one in listed)
    training, test = [one for one in listed if not one.test], [one for one in listed if one.test]
    synth = synthetic(training, work / "docs-synth.jsonl")
    trained = {name: train(work, store, retriever(name, side, work / "docs-synth.jsonl")) for name, side in ADAPTERS}
    adapters = [None, *(name for name, _ in ADAPTERS)]
    out = work / "docs-eval"
    found = evaluate(EvaluationSet(questions(test), questions(training)[:200], corpus), embedder, adapters=adapters, out=out, tell=tell)
    base = VectorIndex.open(out / "indexes" / embedder.document_lineage(None)[0][:16])
    rows = reader_rows(base, embedder, asked(training))
    write_rows(work / "docs-reader-train.jsonl", rows[40:])
    write_rows(work / "docs-reader-dev.jsonl", rows[:40])
    trained[READER["name"]] = train(work, store, READER)
    reader = LocalReader(BaseSpec("seed-lm"), store=store)
    answers = evaluate(
        EvaluationSet(asked(test), (), corpus),
        embedder,
        adapters=adapters,
        readers=[(None, reader), (READER["name"], reader)],
        out=out,
        answered=60,
        max_tokens=ANSWER_TOKENS,
        tell=tell,
    )
    report = {**found, "answers": answers["answers"]}
    write_report(out, {"data": "documentation", **report})
    counts = {"sections": len(listed), "test_queries": len(test), "reader_rows": len(rows) - 40, "answered": min(60, len(asked(test)))}
    return {"sets": list(SETS), **counts, "synth": synth, "trained": trained, **report}


ADAPTERS = (("docs-query", "query"), ("docs-both", "both"))
READER: dict[str, Any] = {
    "task": "causal_lm",
    "name": "docs-reader",
    "base": {"model": "seed-lm"},
    "adapter": {"r": 16, "alpha": 32},
    "data": {"train": "docs-reader-train.jsonl", "eval": "docs-reader-dev.jsonl"},
    "train": {"epochs": 3, "batch": 8, "lr": 3e-3, "max_length": 1600},
    "eval": {"max_new_tokens": ANSWER_TOKENS},
}


# --- One index for many


def tenants_part(data: Path, work: Path) -> dict[str, Any]:
    """Each project's adapters are trained on its own synthetic queries and asked its own test queries over all projects' sections."""
    listed, store = list(sections(data)), AdapterStore(work / "adapters")
    embedder, corpus = LocalEmbedder(BaseSpec("minilm"), store=store), tuple(one.chunk for one in listed)
    shown: dict[str, Any] = {"tenants": len(SETS), "sections": len(listed), "rows": []}
    built: dict[str, dict[str, Any]] = {}  # lineage → its index, when it was built
    ways = {"shared": "query", "own": "both"}
    for project in SETS:
        mine = [one for one in listed if one.project == project]
        path = work / f"tenant-{project}.jsonl"
        synth = synthetic([one for one in mine if not one.test], path)
        for side in ways.values():
            train(work, store, retriever(f"tenant-{project}-{side}", side, path))
        test = EvaluationSet(questions([one for one in mine if one.test]), (), corpus)
        row: dict[str, Any] = {"tenant": project, "queries": len(test.questions), "training_rows": synth["kept"]}
        for way in ("base", *ways):
            adapter = f"tenant-{project}-{ways[way]}" if way in ways else None
            made = evaluate(test, embedder, adapters=[adapter], out=work / "tenants", tell=tell)
            if way in ways:
                built.setdefault(made["indexes"][0]["lineage"], {**made["indexes"][0], "way": way})
            row[way] = {name: made["retrieval"][0]["metrics"][name] for name in ("hit@5", "mrr@10", "ndcg@10")}
        shown["rows"].append(row)
    for way in ways:
        mean = sum(row[way]["ndcg@10"]["mean"] * row["queries"] for row in shown["rows"]) / sum(row["queries"] for row in shown["rows"])
        sizes = [index for index in built.values() if index["way"] == way]
        counted = {"texts_embedded": "embedded", "bytes": "bytes", "build_seconds": "seconds"}
        totals = {name: sum(index[key] for index in sizes) for name, key in counted.items()}
        shown[way] = {"indexes": len(sizes), **totals, "ndcg@10": mean}
    return shown


# --- Medquad


def medquad_part(data: Path, work: Path, *, most: int = 2500, queries: int = 300, pairs: int = 1600) -> dict[str, Any]:
    """The first `queries` test queries over their documents and as many others as make `most`; training pairs from the training split.

    The reranker is a server's own /v1/rerank: the adapter's vectors over what dense and BM25 found together.
    """
    from embedft.embedding.beir import read_beir

    folder, store = data / "retrieval" / "medquad", AdapterStore(work / "adapters")
    beir, training = read_beir(folder, "test", []), read_beir(folder, "train", [])
    rows = [(training.queries[query], training.documents[name]) for query, names in training.relevant.items() for name in names]
    random.Random(7).shuffle(rows)
    write_rows(work / "medquad-train.jsonl", [{"query": query, "document": document} for query, document in rows[:pairs]])
    trained: dict[str, Any] = {}
    for name, side in (("medquad-query", "query"), ("medquad-both", "both")):
        recipe = retriever(name, side, work / "medquad-train.jsonl")
        trained[name] = train(work, store, {**recipe, "train": {**recipe["train"], "epochs": 1}})
    asked_of = dict(list(beir.relevant.items())[:queries])
    kept = {name for names in asked_of.values() for name in names}
    others = [name for name in beir.documents if name not in kept]
    kept.update(random.Random(7).sample(others, most - len(kept)))
    corpus = tuple(Chunk(name, name, text) for name, text in beir.documents.items() if name in kept)
    test = tuple(Question(beir.queries[query], dict(names)) for query, names in asked_of.items())
    fitting = tuple(Question(training.queries[query], dict(names)) for query, names in training.relevant.items() if kept.issuperset(names))
    embedder = LocalEmbedder(BaseSpec("minilm"), store=store)
    adapters = [None, "medquad-query", "medquad-both"]
    with serving(store) as server:
        report = evaluate(
            EvaluationSet(test, fitting[:200], corpus),
            embedder,
            adapters=adapters,
            out=work / "medquad-eval",
            rerank=lambda adapter: lambda question, texts: server.rerank(question, texts, adapter=adapter),
            tell=tell,
        )
    write_report(work / "medquad-eval", {"data": "medquad", **report})
    return {"documents": len(corpus), "test_queries": len(test), "training_pairs": min(pairs, len(rows)), "trained": trained, **report}


@contextmanager
def serving(store: AdapterStore) -> Generator[RemoteEngine]:
    """The retrieval base with the store's adapters behind a server on the `peft` engine."""
    from tests.serve.world import launch

    bases = [{"name": "minilm", "model": "minilm", "task": "embedding", "engine": "peft"}]
    with tempfile.TemporaryDirectory() as folder:
        server = launch({"bases": bases}, folder=Path(folder), store=store.root)
        try:
            server.wait_ready(300)
            yield RemoteEngine(server.url)
        finally:
            server.stop()


def tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"docs": matrix_part, "tenants": tenants_part, "medquad": medquad_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "rag")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    record(given.part, PARTS[given.part](given.data, given.work))


if __name__ == "__main__":
    main()
