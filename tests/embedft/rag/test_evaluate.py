"""The matrix: how deep each stage looks, which documents the questions may name, and what one prompt that is too long costs."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedft.cli import main
from embedft.errors import DataError, InputInvalid, LineageMismatch
from embedft.rag.build import build_index
from embedft.rag.evaluate import EvaluationSet, Question, evaluate, load_questions
from embedft.rag.local import LocalReader
from embedft.rag.remote import RemoteEngine
from embedft.rag.rows import Chunk
from tests.fixtures_embedding import text, tiny_encoder, write_rows
from tests.serve.world import Server


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row["metrics"] for row in report["retrieval"]}


def test_documents_of_many_chunks_leave_room_for_ten_documents(tmp_path: Path, server: Server) -> None:
    corpus = [Chunk(f"{name}#{i}", name, "tea tea") for name in ("long", "longer") for i in range(6)]
    corpus.append(Chunk("right#0", "right", "green tea wants water of eighty degrees"))
    data = EvaluationSet((Question("tea", {"right": 1}),), corpus=tuple(corpus))
    report = evaluate(data, RemoteEngine(server.url), adapters=["a"], out=tmp_path)
    assert rows_of(report)["bm25"]["mrr@10"]["mean"] == pytest.approx(1 / 3)


def test_questions_whose_documents_are_not_in_the_index_are_refused_or_counted(tmp_path: Path, server: Server) -> None:
    engine, told = RemoteEngine(server.url), list[str]()
    build_index(tmp_path / "i", [Chunk("tea.md#0", "tea.md", "tea")], engine, adapter="a")
    known, unknown = Question("tea", {"tea.md": 1}), Question("bread", {"docs/bread.md": 1})
    options: dict[str, Any] = {"adapters": ["a"], "out": tmp_path, "index": tmp_path / "i", "tell": told.append}
    with pytest.raises(DataError, match=r"none of the 1 documents.*docs/bread\.md.*the index has tea\.md"):
        evaluate(EvaluationSet((unknown,)), engine, **options)
    report = evaluate(EvaluationSet((known, unknown)), engine, **options)
    assert rows_of(report)["dense"]["hit@1"]["mean"] == 0.5
    assert report["notes"] == [
        "1 of the 2 documents that the questions name are not in the index, such as docs/bread.md: they count as missed"
    ]
    assert report["notes"][0] in told
    assert evaluate(EvaluationSet((known,)), engine, **options)["notes"] == []


def test_questions_without_documents_and_without_a_reader_are_refused(tmp_path: Path, server: Server) -> None:
    engine = RemoteEngine(server.url)
    build_index(tmp_path / "i", [Chunk("tea.md#0", "tea.md", "tea")], engine, adapter="a")
    with pytest.raises(DataError, match="expected a column document, or --lm-base or --lm-adapter"):
        evaluate(EvaluationSet((Question("tea", answers=("hot",)),)), engine, adapters=["a"], out=tmp_path, index=tmp_path / "i")


def test_an_adapter_of_other_vectors_is_refused_before_the_first_one_is_measured(tmp_path: Path, server: Server) -> None:
    engine, told = RemoteEngine(server.url), list[str]()
    build_index(tmp_path / "i", [Chunk("tea.md#0", "tea.md", "tea")], engine, adapter="a")
    data = EvaluationSet((Question("tea", {"tea.md": 1}),))
    with pytest.raises(LineageMismatch, match=r"by b@.*fit a linear map \(`embedft rag ask --map`\)"):
        evaluate(data, engine, adapters=["a", "b"], out=tmp_path, index=tmp_path / "i", tell=told.append)
    assert told == []


def test_a_prompt_that_is_too_long_costs_one_answer_and_is_counted(tmp_path: Path, server: Server, seed_reader: LocalReader) -> None:
    engine = RemoteEngine(server.url)
    build_index(tmp_path / "i", [Chunk("tea.md#0", "tea.md", "tea")], engine, adapter="a")
    short, long = Question("tea", answers=("tea",)), Question("word " * 5000, answers=("word",))
    options: dict[str, Any] = {
        "adapters": ["a"],
        "readers": [(None, seed_reader)],
        "out": tmp_path,
        "index": tmp_path / "i",
        "max_tokens": 2,
    }
    (row,) = evaluate(EvaluationSet((short, long)), engine, **options)["answers"]
    assert row["note"].startswith("1 of 2 prompts refused and scored 0: ")
    assert "retrieve less" in row["note"]
    assert row["metrics"]["faithfulness"]["mean"] <= 0.5
    with pytest.raises(InputInvalid, match="retrieve less"):  # no answer at all is no evaluation
        evaluate(EvaluationSet((long, long)), engine, **options)


def test_questions_are_read_as_any_other_rows_are(tmp_path: Path) -> None:
    rows = [
        {"question": "green\u2028tea", "answers": ["a", "b"], "document": "d"},
        {"question": "x", "answer": 5},
        {"question": " "},
        {"question": "y", "documents": [1]},
    ]
    path = tmp_path / "qa.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:1]), encoding="utf-8")
    assert load_questions(path).questions == (Question("green\u2028tea", {"d": 1}, ("a", "b")),)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        load_questions(path)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"qa.jsonl:{line}" for line in (2, 3, 4)]


def test_a_field_without_a_value_is_no_document_and_no_answer(tmp_path: Path, server: Server) -> None:
    (tmp_path / "qa.csv").write_text("question,answer,document\ntea,,tea.md\nbread,flour,\n")
    write_rows(tmp_path / "qa.jsonl", [{"question": "tea", "answer": None, "document": "tea.md"}, {"question": "bread", "answer": "flour"}])
    found = load_questions(tmp_path / "qa.csv")
    assert found.questions == (Question("tea", {"tea.md": 1}), Question("bread", answers=("flour",)))
    assert load_questions(tmp_path / "qa.jsonl") == found
    engine = RemoteEngine(server.url)
    build_index(tmp_path / "i", [Chunk("tea.md#0", "tea.md", "tea")], engine, adapter="a")
    report = evaluate(found, engine, adapters=["a"], out=tmp_path, index=tmp_path / "i")
    assert report["notes"] == ["1 of the 2 questions name no document: what is found is scored on the other 1"]
    assert rows_of(report)["dense"]["hit@1"]["mean"] == 1.0


def test_an_index_is_evaluated_with_its_own_adapter_and_base(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    build_index(tmp_path / "i", [Chunk("d", "d", "tea")], RemoteEngine(server.url), adapter="a")
    questions = write_rows(tmp_path / "qa.jsonl", [{"question": "tea", "document": "d"}])
    evaluation = ["rag", "eval", questions, "--out", str(tmp_path / "out"), "--json", "--index"]
    assert main([*evaluation, str(tmp_path / "i"), "--server", server.url]) == 0
    assert json.loads(capsys.readouterr().out)["retrieval"][0]["retriever"] == "a"
    base = tiny_encoder(tmp_path / "base", pooling="mean")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "d").with_suffix(".txt").write_text(text("document", 0, 0))
    assert main(["rag", "index", str(tmp_path / "docs"), "--out", str(tmp_path / "j"), "--base", str(base), "--json"]) == 0
    capsys.readouterr()
    write_rows(tmp_path / "qa.jsonl", [{"question": "tea", "document": "d.txt"}])
    assert main([*evaluation, str(tmp_path / "j")]) == 0  # MiniLM's vectors would be refused
    assert json.loads(capsys.readouterr().out)["retrieval"][0]["retriever"] == "base"
