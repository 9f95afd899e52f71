"""Retriever adapters on documentation: a base, an adapter and a query-only adapter over it, every stage, with intervals.

    python benchmarks/rag_docs.py --data ../shared/data --work runs/rag

Queries are the sections' own headings, cut out of the texts: a stand-in for questions that needs no language model. Train and test
sections come from different files. Writes the part `docs` of benchmarks/results/rag.json.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rag import ROOT, record
from embedft.adapters.store import AdapterStore
from embedft.rag.chunks import Chunking, chunks_of
from embedft.rag.documents import Document, read_documents

SETS = ("docs_typer", "docs_httpx", "docs_starlette")
HEADING = re.compile(r"\A\s*#{1,6} +(?P<title>.+?) *#*\s*\n(?P<rest>.*)\Z", re.S)


def sections(data: Path) -> Iterator[tuple[str, str, str]]:
    """(file, query, text) of the first chunk of each section that has a telling heading and enough text."""
    for name in SETS:
        for document in read_documents(data / "docs" / name).documents:
            if document.format != "markdown" or "release" in document.id or "changelog" in document.id.lower():
                continue
            for chunk in chunks_of([Document(f"{name}/{document.id}", document.text, "markdown")], Chunking(size=120, overlap=0)):
                found = HEADING.match(chunk.text)
                if found and len(found["rest"].split()) >= 15 and len(found["title"]) >= 4:
                    above = str(chunk.metadata.get("section", "")).rpartition(" / ")[2]
                    yield chunk.document, plain(f"{above}: {found['title']}" if above else found["title"]), found["rest"]


def plain(heading: str) -> str:
    """Without Markdown: links keep their text."""
    return " ".join(re.sub(r"\]\(.*?\)|[`*_\[\]]|\{.*?\}|[^\x00-\x7f]", "", heading).split())


def write_set(data: Path, out: Path) -> dict[str, int]:
    """A BEIR folder whose corpus is every section; a fifth of the files are for the test."""
    rows = list(dict.fromkeys(sections(data)))
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    corpus, queries = list[str](), list[str]()
    for number, (file, query, text) in enumerate(rows):
        corpus.append(json.dumps({"_id": f"d{number}", "title": "", "text": text}))
        queries.append(json.dumps({"_id": f"q{number}", "text": query}))
        split = "test" if hashlib.sha256(file.encode()).digest()[0] % 3 == 0 else "train"
        lines[split].append(f"q{number}\td{number}\t1")
    (out / "corpus.jsonl").write_text("\n".join(corpus) + "\n")
    (out / "queries.jsonl").write_text("\n".join(queries) + "\n")
    for split, found in lines.items():
        (out / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(found) + "\n")
    return {"documents": len(rows), **{split: len(found) for split, found in lines.items()}}


def train(work: Path, store: AdapterStore, side: str) -> dict[str, Any]:
    from embedft.embedding.train import train as train_embedding
    from embedft.recipe import load_recipe

    recipe = {
        "task": "embedding",
        "name": f"docs-{side}",
        "base": {"model": "minilm"},
        "adapter": {"r": 16, "alpha": 32, "side": side},
        "data": {"train": str(work / "docs-set")},
        "train": {"epochs": 2, "batch": 32, "lr": 5e-4, "max_length": 128},
    }
    path = work / f"docs-{side}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = train_embedding(load_recipe(str(path), []), store=store)  # pyright: ignore[reportArgumentType]
    return {"seconds": result.seconds, "trainable": result.trainable}  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    from embedft.base import BaseSpec
    from embedft.rag.evaluate import evaluate, load_questions
    from embedft.rag.local import LocalEmbedder
    from embedft.rag.report import write_report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "rag")
    given = parser.parse_args()
    store = AdapterStore(given.work / "adapters")
    counts = write_set(given.data, given.work / "docs-set")
    print(json.dumps(counts), flush=True)
    trained = {side: train(given.work, store, side) for side in ("both", "query") if f"docs-{side}" not in store.names()}
    report = evaluate(
        load_questions(given.work / "docs-set"),
        LocalEmbedder(BaseSpec("minilm"), store=store),
        adapters=[None, "docs-query", "docs-both"],
        out=given.work / "docs-eval",
        tell=lambda line: print(line, flush=True),
    )
    write_report(given.work / "docs-eval", {"data": "documentation sections", **report})
    record("docs", {"sets": list(SETS), "queries_are": "the sections' own headings", **counts, "trained": trained, **report})


if __name__ == "__main__":
    main()
