"""`embedft rag index|ask|eval`: arguments and what is printed. Imports the rest of the room only when a command runs."""

import argparse
import functools
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.cli.options import command, finite, positive, store_of, store_option
from embedft.cli.show import Progress
from embedft.errors import UsageError

if TYPE_CHECKING:
    from embedft.rag.engines import Embedder, Reader
    from embedft.rag.index import VectorIndex
    from embedft.rag.search import Stages


def add_commands(commands: Any) -> None:
    group = commands.add_parser("rag", help="question answering over documents: index, ask, eval").add_subparsers(
        metavar="ACTION", required=True
    )
    index = command(group, "index", _index, "index a folder of documents, or bring its index up to date")
    index.add_argument("docs", metavar="DOCS", type=Path, help="a folder, or a file: Markdown, text, HTML, PDF, Python")
    index.add_argument("--out", type=Path, required=True, metavar="DIR", help="the index's folder")
    index.add_argument("--adapter", help="the adapter whose vectors are stored (default: the base)")
    index.add_argument(
        "--kind", choices=("auto", "flat", "hnsw", "ivfpq"), default="auto", help="FAISS index (auto: flat, above 20,000 hnsw)"
    )
    index.add_argument("--chunk-size", type=int, default=180, metavar="TOKENS", help="of a chunk at most, counted roughly, as word pieces")
    index.add_argument("--overlap", type=int, default=20, metavar="TOKENS", help="that a chunk repeats of the one before")
    index.add_argument("--max-mib", type=finite, default=32.0, help="a larger file is refused (default: 32)")
    index.add_argument("--no-bm25", action="store_true", help="vectors only: no hybrid search later")
    index.add_argument("--strict", action="store_true", help="fail where a file cannot be read, instead of naming and skipping it")
    ask = command(group, "ask", _ask, "answer a question from an index, with its sources")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--index", type=Path, required=True, metavar="DIR", help="the index's folder")
    ask.add_argument("--adapter", help="the retriever's adapter (default: the one that the index was built with)")
    ask.add_argument("--lm-adapter", help="the reader's adapter")
    ask.add_argument("-k", type=int, default=5, help="passages (default: 5)")
    ask.add_argument(
        "--fusion", choices=("none", "sparse", "rrf", "weights"), default="none", help="vectors; BM25; both by ranks or weights"
    )
    ask.add_argument("--weight", type=float, default=0.5, help="of the vectors, for --fusion weights: `rag eval` fits it (default: 0.5)")
    ask.add_argument("--rerank", action="store_true", help="reorder by the server's /v1/rerank")
    ask.add_argument(
        "--map", action="store_true", help="where the adapter's lineage is not the index's: fit a linear map, and say its loss"
    )
    ask.add_argument("--max-tokens", type=positive, default=128, help="of the answer")
    ask.add_argument("--sources-only", action="store_true", help="no answer, only what was found")
    evaluate = command(group, "eval", _eval, "score retriever adapters and reader adapters against each other")
    evaluate.add_argument("data", metavar="DATA", type=Path, help="a BEIR folder, or a file of questions and answers (then with --index)")
    evaluate.add_argument(
        "--adapter",
        action="append",
        help="a retriever's adapter; 'base' is the base; may be repeated (default: the --index's own, or the base)",
    )
    evaluate.add_argument("--lm-adapter", action="append", help="a reader's adapter; 'base' is the base; may be repeated")
    evaluate.add_argument("--index", type=Path, metavar="DIR", help="an index that there is; else one is made for each lineage")
    evaluate.add_argument("--out", type=Path, default=Path("runs/rag-eval"), metavar="DIR", help="where the report goes")
    evaluate.add_argument("--queries", type=positive, help="at most so many questions")
    evaluate.add_argument("--answers", type=positive, default=100, help="questions put to each reader (default: 100)")
    evaluate.add_argument("--rerank", action="store_true", help="also measure the server's /v1/rerank")
    for parser in (index, ask, evaluate):
        parser.add_argument("--server", metavar="URL", help="a running `embedft serve`; without it, the models are loaded here")
        parser.add_argument("--base", help="the embedding base (default: the adapter's own, or minilm)")
        parser.add_argument("--lm-base", help="the language model (default: the lm-adapter's own)")
        store_option(parser)
        parser.add_argument("--api-key", help="the server's key")


def _index(arguments: argparse.Namespace) -> int:
    _prepare()
    from pydantic import ValidationError

    from embedft.errors import DocumentsUnusable
    from embedft.rag.ann import AnnSettings
    from embedft.rag.build import build_index
    from embedft.rag.chunks import Chunking, chunks_of
    from embedft.rag.documents import read_documents

    adapter = _named(arguments.adapter)
    try:
        chunking = Chunking(size=arguments.chunk_size, overlap=arguments.overlap)
    except ValidationError as error:
        fault = error.errors()[0]
        options = {"size": "--chunk-size", "overlap": "--overlap"}
        option = options.get(".".join(map(str, fault["loc"])), ", ".join(options.values()))
        raise UsageError(f"{option}: {fault['msg'].removeprefix('Value error, ')}") from None
    reading = read_documents(arguments.docs, max_bytes=int(arguments.max_mib * 2**20))
    if reading.skipped and arguments.strict:
        raise DocumentsUnusable(reading.skipped)
    for line in reading.skipped:
        _say(f"skipped {line}")
    report = build_index(
        arguments.out,
        chunks_of(reading.documents, chunking),
        _embedder(arguments, adapter),
        adapter=adapter,
        recorded=_own_name(arguments),
        settings=AnnSettings(kind=arguments.kind),
        bm25=not arguments.no_bm25,
        notes={"chunking": chunking.model_dump(), "base": arguments.base},
        progress=None if arguments.json else Progress(),
    )
    found = {
        "path": str(arguments.out),
        "documents": len(reading.documents),
        "skipped": list(reading.skipped),
        "other_files": reading.other,
    }
    if arguments.json:
        print(json.dumps({**found, **asdict(report)}))
        return 0
    counts = f"{report.embedded} embedded, {report.reused} reused"
    print(f"{report.chunks} chunks of {len(reading.documents)} documents by {report.made_by}: {counts}")
    print(f"{report.kind} index {report.version} in {arguments.out}, {report.seconds:.1f} s; lineage {report.lineage[:12]}")
    if reading.other:
        kinds = ", ".join(f"{count} {kind}" for kind, count in reading.others.items())
        print(f"{reading.other} files of other kinds are not in it: {kinds}")
    if report.truncated:
        print(
            f"{report.truncated} of the {report.embedded} chunks embedded now are longer than the model reads (an adapter's max_length: "
            f"`embedft adapters show`), and their ends are not in the vectors: choose a --chunk-size below {arguments.chunk_size}"
        )
    return 0


def _own_name(arguments: argparse.Namespace) -> str | None:
    """What an adapter folder of this machine calls itself: an index may travel, and a path of this machine may not."""
    from embedft.adapters.passport import read_passport
    from embedft.adapters.store import adapter_folder

    if not _named(arguments.adapter) or arguments.server:
        return None
    if (folder := adapter_folder(arguments.adapter, store_of(arguments))) != Path(arguments.adapter):
        return None
    name = read_passport(folder, name=arguments.adapter).name
    _say(f"the index records its adapter as {name!r}: `rag ask` looks for that name in the store, unless --adapter names the folder again")
    return name


def _ask(arguments: argparse.Namespace) -> int:
    _prepare()
    from embedft.rag.answer import cited, retrieve, stream_answer
    from embedft.rag.index import VectorIndex

    if not arguments.question.strip():
        raise UsageError("the question is empty: ask something")
    index = VectorIndex.open(arguments.index)
    adapter = _named(arguments.adapter) if arguments.adapter else index.adapter
    arguments.base = arguments.base or index.notes.get("base")
    embedder = _embedder(arguments, adapter)
    stages = _stages(arguments, adapter)
    if arguments.map:
        _map(index, embedder, adapter)
    sources = retrieve(index, arguments.question, embedder, adapter=adapter, stages=stages)
    reader = None if arguments.sources_only else _reader(arguments, _named(arguments.lm_adapter))
    pieces: list[str] = []
    if reader is not None:
        options = {"adapter": _named(arguments.lm_adapter), "max_tokens": arguments.max_tokens}
        for piece in stream_answer(arguments.question, sources, reader, **options):
            pieces.append(piece)
            if not arguments.json:
                print(piece, end="", flush=True)
    answer = "".join(pieces)
    used = cited(answer, sources) if reader is not None else []
    if arguments.json:
        shown = {"question": arguments.question, "answer": answer if reader else None, "cited": used, "adapter": adapter}
        print(json.dumps({**shown, "lm_adapter": arguments.lm_adapter, "sources": [asdict(source) for source in sources]}))
        return 0
    print("\n" if reader is not None else "", end="\n" if reader is not None else "")
    for source in sources:
        mark = "*" if source.number in used else " "
        section = f" ({source.section})" if source.section else ""
        print(f"{mark}[{source.number}] {source.score:.3f}  {source.document}{section}: {' '.join(source.text.split())[:160]}")
    if reader is None and not arguments.sources_only:
        _say("no answer: name a language model with --lm-base or --lm-adapter, or a --server")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    _prepare()
    from embedft.rag.build import usable
    from embedft.rag.evaluate import evaluate, load_questions
    from embedft.rag.index import VectorIndex
    from embedft.rag.report import write_report

    data = load_questions(arguments.data, limit=arguments.queries)
    usable(arguments.out)
    own: str | None = None
    if arguments.index is not None:
        index = VectorIndex.open(arguments.index)
        own, arguments.base = index.adapter, arguments.base or index.notes.get("base")
    adapters = [_named(name) for name in arguments.adapter] if arguments.adapter else [own]
    embedder = _embedder(arguments, next((name for name in adapters if name), None))
    names = [_named(name) for name in arguments.lm_adapter or ([] if arguments.lm_base is None else ["base"])]
    reader = _reader(arguments, next((name for name in names if name), None)) if names else None
    remote = _remote(arguments) if arguments.rerank else None
    report = evaluate(
        data,
        embedder,
        adapters=adapters,
        readers=[(name, reader) for name in names] if reader else [],
        out=arguments.out,
        index=arguments.index,
        rerank=(lambda adapter: lambda question, texts: remote.rerank(question, texts, adapter=adapter)) if remote else None,
        answered=arguments.answers,
        tell=(lambda _: None) if arguments.json else _say,
    )
    report = {"data": arguments.data.name, **report}
    paths = write_report(arguments.out, report)
    if arguments.json:
        print(json.dumps({**report, "files": [str(path) for path in paths]}))
    else:
        print(paths[1].read_text(encoding="utf-8"))
        print(f"in {', '.join(map(str, paths))}")
    return 0


def _map(index: "VectorIndex", embedder: "Embedder", adapter: str | None) -> None:
    from embedft.rag.mapping import fit_map

    lineage, _ = embedder.document_lineage(adapter)
    if lineage == index.lineage:
        return
    found = index.map_from(lineage) or fit_map(index, embedder, adapter)
    _say(
        f"a linear map {lineage[:12]} → {index.lineage[:12]} (fitted on {found.documents} documents) finds {found.recall:.1%} "
        "of the 10 nearest that the adapter's own index would find: index again for the rest"
    )


def _stages(arguments: argparse.Namespace, adapter: str | None) -> "Stages":
    from embedft.rag.search import Stages

    if arguments.k < 1:
        raise UsageError(f"-k {arguments.k}: at least 1 passage")
    if not 0 <= arguments.weight <= 1:
        raise UsageError(f"--weight {arguments.weight}: expected 0 … 1")
    remote = _remote(arguments) if arguments.rerank else None
    rerank = functools.partial(remote.rerank, adapter=adapter) if remote else None
    return Stages(k=arguments.k, fusion=arguments.fusion, weight=arguments.weight, rerank=rerank, mapped=arguments.map)


def _remote(arguments: argparse.Namespace) -> Any:
    from embedft.rag.remote import RemoteEngine

    if not arguments.server:
        raise UsageError("--rerank asks a server's /v1/rerank: name it with --server")
    return RemoteEngine(arguments.server, model=arguments.base, api_key=arguments.api_key)


def _embedder(arguments: argparse.Namespace, adapter: str | None) -> "Embedder":
    from embedft.rag.local import LocalEmbedder
    from embedft.rag.remote import RemoteEngine

    if arguments.server:
        return RemoteEngine(arguments.server, model=arguments.base, api_key=arguments.api_key)
    base = arguments.base or (None if adapter else "minilm")
    return LocalEmbedder.of(adapter, base=base, store=store_of(arguments))


def _reader(arguments: argparse.Namespace, adapter: str | None) -> "Reader | None":
    from embedft.rag.local import LocalReader
    from embedft.rag.remote import RemoteEngine

    if arguments.server:
        return RemoteEngine(arguments.server, model=arguments.lm_base, api_key=arguments.api_key)
    if adapter is None and arguments.lm_base is None:
        return None
    return LocalReader.of(adapter, base=arguments.lm_base, store=store_of(arguments))


def _prepare() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # nothing is downloaded; weights load in an instant
    for module in ("faiss", "llama_index"):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"embedft rag needs {module}: pip install 'embedft[rag]'")


def _named(name: str | None) -> str | None:
    return None if name in (None, "base") else name


def _say(line: str) -> None:
    sys.stderr.write(f"note: {line}\n")
