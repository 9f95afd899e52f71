"""`embedft rag` as a user meets it: files in, an index, answers with sources, an evaluation report; and every mistake named."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from embedft.cli import main
from embedft.rag.index import VectorIndex
from tests.fixtures_embedding import write_rows
from tests.serve.world import Server, put_adapter

Run = Any


@pytest.fixture
def run(server: Server, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one `embedft rag` command against the server; (status, its JSON)."""

    def command(*arguments: object) -> tuple[int, dict[str, Any]]:
        status = main(["rag", *map(str, arguments), "--server", server.url, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return command


def test_index_then_ask_with_sources_and_any_reader(run: Run, docs: Path, tmp_path: Path) -> None:
    status, made = run("index", docs, "--out", tmp_path / "i", "--adapter", "a")
    assert (status, made["documents"], made["embedded"]) == (0, 2, made["chunks"])
    status, asked = run("ask", "boiling water", "--index", tmp_path / "i", "--fusion", "sparse", "-k", 1, "--lm-adapter", "s")
    assert status == 0
    assert asked["sources"][0]["document"] == "tea.md"
    assert asked["answer"].startswith("[s@")
    assert run("ask", "x", "--index", tmp_path / "i", "--lm-adapter", "t", "-k", 2)[1]["answer"].startswith("[t@")
    weighed = run("ask", "boiling water", "--index", tmp_path / "i", "--fusion", "weights", "--weight", 0, "-k", 1, "--sources-only")[1]
    assert weighed["sources"][0]["document"] == "tea.md"
    only = run("ask", "x", "--index", tmp_path / "i", "--sources-only", "-k", 2)[1]
    assert (only["answer"], only["adapter"], len(only["sources"])) == (None, "a", 2)  # the index's own adapter


def test_a_disk_without_room_is_told_and_leaves_the_index_as_it_was(run: Run, docs: Path, tmp_path: Path) -> None:
    assert run("index", docs, "--out", tmp_path / "i", "--adapter", "a")[0] == 0
    (docs / "more.md").write_text("\n\n".join(f"# Part {number}\n" + "Boil the water well. " * 40 for number in range(200)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        status, made = run("index", docs, "--out", tmp_path / "i", "--adapter", "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, made["error"]["code"]) == (1, "file_failed")
    assert run("ask", "boiling water", "--index", tmp_path / "i", "--sources-only", "-k", 1)[1]["sources"][0]["document"] == "tea.md"
    assert run("index", docs, "--out", tmp_path / "i", "--adapter", "a")[1]["documents"] == 3


def test_people_get_text_and_a_stream(server: Server, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (docs / "bad.txt").write_bytes(b"\0")
    for name in ("a.docx", "b.DOCX", "Makefile"):
        (docs / name).write_bytes(b"x")
    assert main(["rag", "index", str(docs), "--out", str(tmp_path / "i"), "--server", server.url, "--base", "texts"]) == 0
    told = capsys.readouterr()
    assert "chunks of 2 documents by base" in told.out
    assert "3 files of other kinds are not in it: 2 .docx, 1 no ending" in told.out
    assert "skipped bad.txt: it is binary" in told.err
    ask = ["rag", "ask", "tea", "--index", str(tmp_path / "i"), "--server", server.url, "--base", "texts", "--lm-base", "words"]
    assert main([*ask, "--max-tokens", "3"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("[base|")
    assert "tea.md" in told.out


def test_chunks_that_are_cut_are_counted_and_the_chunk_size_that_cut_them_is_named(
    server: Server, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = ["rag", "index", str(docs), "--out", str(tmp_path / "i"), "--server", server.url, "--adapter", "b", "--chunk-size", "90"]
    assert main(index) == 0  # b reads 20 tokens
    told = capsys.readouterr().out
    assert "chunks embedded now are longer than the model reads" in told  # of those whose vectors it has nobody knows it any more
    assert "`embedft adapters show`), and their ends are not in the vectors: choose a --chunk-size below 90" in told


def test_a_foreign_adapter_is_refused_until_a_map_is_asked_for(run: Run, docs: Path, tmp_path: Path, capsys: Any) -> None:
    run("index", docs, "--out", tmp_path / "i", "--adapter", "a")
    status, refused = run("ask", "x", "--index", tmp_path / "i", "--adapter", "b", "--sources-only")
    assert (status, refused["error"]["code"]) == (1, "lineage_mismatch")
    status, small = run("ask", "x", "--index", tmp_path / "i", "--adapter", "b", "--sources-only", "--map")
    assert (status, "at least 50 documents" in small["error"]["message"]) == (2, True)
    (docs / "long.txt").write_text(
        "\n\n".join(f"Sentence {i} about thing number {i * i}, which nobody has heard of before." for i in range(900))
    )
    run("index", docs, "--out", tmp_path / "i", "--adapter", "a", "--chunk-size", 32, "--overlap", 0)
    assert (
        main(["rag", "ask", "x", "--index", str(tmp_path / "i"), "--adapter", "b", "--sources-only", "--map", "--server", _url(run)]) == 0
    )
    assert "of the 10 nearest" in capsys.readouterr().err


def _url(run: Run) -> str:
    return next(cell.cell_contents.url for cell in run.__closure__ if hasattr(cell.cell_contents, "url"))


def test_an_adapter_that_is_gone_since_indexing_is_named(server: Server, rag_world: Any, run: Run, docs: Path, tmp_path: Path) -> None:
    from tests.serve.world import ADMIN

    put_adapter(rag_world.store, "passing", rag_world.texts, seed=33)
    assert server.put("passing").status_code == 200
    run("index", docs, "--out", tmp_path / "i", "--adapter", "passing")
    assert server.client.delete("/v1/adapters/passing", headers=ADMIN).status_code == 200
    status, gone = run("ask", "x", "--index", tmp_path / "i", "--sources-only")
    assert (status, gone["error"]["code"]) == (1, "adapter_not_found")
    assert "passing" in gone["error"]["message"]


def test_mistakes_are_named(run: Run, docs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (docs / "bad.txt").write_bytes(b"\0")
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
    write_rows(tmp_path / "qa.jsonl", [{"question": "tea", "document": "tea.md"}])
    run("index", docs, "--out", tmp_path / "i", "--adapter", "a")
    for code, arguments in (
        ("documents_unusable", ("index", tmp_path / "empty", "--out", tmp_path / "j")),
        ("documents_unusable", ("index", docs, "--out", tmp_path / "j", "--strict")),
        ("usage", ("index", docs, "--out", tmp_path / "j", "--chunk-size", 20, "--overlap", 30)),
        ("index_not_found", ("ask", "x", "--index", tmp_path / "none")),
        ("index_invalid", ("ask", "x", "--index", docs)),
        ("adapter_not_found", ("ask", "x", "--index", tmp_path / "i", "--adapter", "nobody")),
        ("usage", ("ask", "x", "--index", tmp_path / "i", "-k", 0)),
        ("usage", ("ask", "x", "--index", tmp_path / "i", "--weight", 2)),
        ("usage", ("eval", tmp_path / "none.jsonl")),
        ("data_invalid", ("eval", docs / "bread.txt")),
        ("data_invalid", ("eval", tmp_path / "paper.pdf")),
        ("usage", ("index", docs, "--out", docs / "bread.txt")),
        ("usage", ("index", docs, "--out", docs / "bread.txt" / "below")),
        ("usage", ("eval", tmp_path / "qa.jsonl", "--index", tmp_path / "i", "--out", docs / "bread.txt")),
    ):
        status, told = run(*arguments)
        assert status in (1, 2)
        assert told["error"]["code"] == code, (arguments, told)
    for option, size, overlap in (("--chunk-size", 5, 9), ("--overlap", 20, -1), ("--chunk-size, --overlap", 20, 30)):
        told = run("index", docs, "--out", tmp_path / "j", "--chunk-size", size, f"--overlap={overlap}")[1]
        assert told["error"]["message"].startswith((f"{option}: Input should", f"{option}: overlap 30 must"))
    assert len(VectorIndex.open(tmp_path / "i")) > 0  # the last good index is still there


@pytest.mark.parametrize(
    "wrong",
    [
        ("index", "docs", "--out", "i", "--max-mib", "inf"),
        ("ask", "x", "--index", "i", "--max-tokens", "-1"),
        ("eval", "qa.jsonl", "--index", "i", "--queries", "0"),
        ("eval", "qa.jsonl", "--index", "i", "--answers", "0"),
    ],
)
def test_a_number_that_cannot_be_meant_is_wrong_usage(wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["rag", *wrong])
    assert stopped.value.code == 2
    assert "expected a" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://[::1", "localhost:8000", "http://"])
def test_a_server_whose_address_is_none_is_wrong_usage(docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert main(["rag", "index", str(docs), "--out", str(tmp_path / "i"), "--server", url]) == 2
    assert "URL" in capsys.readouterr().err


def test_the_base_is_named_alike_when_indexing_and_when_asking(run: Run, docs: Path, tmp_path: Path) -> None:
    assert run("index", docs, "--out", tmp_path / "i", "--adapter", "base", "--base", "texts")[1]["made_by"] == "base"
    assert run("ask", "tea", "--index", tmp_path / "i", "--adapter", "base", "--sources-only")[1]["adapter"] is None


def beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    texts = [f"story {i} of animal{i}" for i in range(12)]
    write_rows(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)])
    # the fake engine finds only equal texts: half of the queries are a document's own text, half share one word with it
    queries = [texts[i] if i % 2 else f"animal{i}" for i in range(12)]
    write_rows(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(queries)])
    for split, numbers in (("train", range(6)), ("test", range(6, 12))):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in numbers))
    return folder


def test_the_matrix_of_retrievers_stages_and_readers(run: Run, tmp_path: Path) -> None:
    data, out = beir(tmp_path / "beir"), tmp_path / "out"
    adapters = ["--adapter", "q", "--adapter", "q2", "--adapter", "a"]
    status, report = run("eval", data, *adapters, "--lm-adapter", "s", "--lm-adapter", "base", "--out", out, "--answers", 3, "--rerank")
    assert status == 0
    rows = {(row["retriever"], row["stage"]): row["metrics"] for row in report["retrieval"]}
    assert set(rows) == {("–", "bm25"), *((name, stage) for name in ("q", "q2", "a") for stage in ("dense", "rrf", "weights", "rerank"))}
    assert rows["a", "dense"]["hit@1"]["mean"] == 0.5 <= rows["a", "dense"]["hit@5"]["mean"]
    assert rows["–", "bm25"]["hit@1"]["mean"] == 1.0
    assert rows["a", "weights"]["mrr@10"]["mean"] > rows["a", "dense"]["mrr@10"]["mean"]
    low, high = rows["a", "dense"]["ndcg@10"]["ci95"]
    assert low < rows["a", "dense"]["ndcg@10"]["mean"] < high
    assert [sorted(index["adapters"]) for index in report["indexes"]] == [["q", "q2"], ["a"]]  # query-only adapters share one
    assert {(row["retriever"], row["reader"]) for row in report["answers"]} == {(r, lm) for r in ("q", "q2", "a") for lm in ("s", "base")}
    page, written = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<td>q2</td><td>weights</td>" in page
    assert "| q2 | weights |" in written
    for name in ("retrieval-ndcg", "answers-faithfulness"):  # no F1: a BEIR folder holds no answers
        assert f"({name}.png)" in written
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not (out / "answers-f1.png").exists()


def test_documents_without_text_are_not_indexed_for_an_evaluation(run: Run, tmp_path: Path) -> None:
    data = beir(tmp_path / "beir")
    with (data / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "blank", "title": "", "text": " "}\n')  # an engine whose tokenizer adds nothing refuses it
    status, report = run("eval", data, "--adapter", "a", "--out", tmp_path / "out")
    assert (status, report["indexes"][0]["chunks"]) == (0, 12)


def test_a_file_of_questions_is_scored_against_an_index(run: Run, docs: Path, tmp_path: Path) -> None:
    run("index", docs, "--out", tmp_path / "i", "--adapter", "a")
    said = run("ask", "sourdough", "--index", tmp_path / "i", "--lm-adapter", "s", "--max-tokens", 48)[1]["answer"]
    rows = [
        {"question": "boiling water", "answer": "black tea", "document": "tea.md"},
        {"question": "sourdough", "answers": ["over night", said.upper()]},
        {"question": "flour", "document": "tea.md"},
    ]
    source = write_rows(tmp_path / "qa.jsonl", rows)
    arguments = ("--adapter", "a", "--index", tmp_path / "i", "--out", tmp_path / "out", "--lm-adapter", "s")
    status, report = run("eval", source, *arguments)
    assert status == 0
    answers = {name: metric["mean"] for name, metric in report["answers"][0]["metrics"].items()}
    assert (answers["exact_match"], answers["f1"]) == (0.5, 0.5)  # of the two with answers
    assert 0 <= answers["faithfulness"] < 1
    stages = {row["stage"]: row["metrics"] for row in report["retrieval"]}
    assert set(stages) == {"dense", "bm25", "rrf"}
    assert stages["bm25"]["hit@1"]["mean"] == stages["bm25"]["ndcg@10"]["mean"] == 0.5  # of the two whose document is known
    assert (tmp_path / "out" / "answers-f1.png").exists()
    assert run("eval", source, "--adapter", "a", "--out", tmp_path / "out")[1]["error"]["code"] == "usage"  # no documents named
    assert run("eval", source, *arguments[2:], "--adapter", "b")[1]["error"]["code"] == "lineage_mismatch"


def test_in_this_process_without_a_server(docs: Path, tmp_path: Path, minilm_store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--adapters", str(minilm_store.root), "--json"]
    assert main(["rag", "index", str(docs), "--out", str(tmp_path / "i"), "--base", "minilm", *store]) == 0
    capsys.readouterr()
    ask = ["rag", "ask", "How hot must the water for black tea be?", "--index", str(tmp_path / "i"), "-k", "1", *store]
    assert main([*ask, "--lm-base", "seed-lm", "--max-tokens", "8"]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert "boiling" in asked["sources"][0]["text"]
    assert isinstance(asked["answer"], str)
    assert main([*ask, "--adapter", "one"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "lineage_mismatch"
    own = str(minilm_store.folder("one"))
    assert main(["rag", "index", str(docs), "--out", str(tmp_path / "own"), "--adapter", own, *store]) == 0
    assert "records its adapter as 'one'" in capsys.readouterr().err
    assert VectorIndex.open(tmp_path / "own").adapter == "one"  # no path of this machine
