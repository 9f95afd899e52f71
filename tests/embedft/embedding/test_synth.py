"""Queries for a bare corpus: the same every time, found again, never leaking into their passage, and resumable against a real server."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedft.cli import main
from embedft.embedding.synth import Synth, synthesize
from embedft.errors import UsageError
from embedft.records import read_records
from tests.fixtures_embedding import write_rows

FACTS = {
    "Boilers": "A boiler heats water for the whole house. Bleed it before the winter. Pressure should stay between one and two bar.",
    "Trams and rails": "Trams run on rails set into the street. Their wheels wear the outer rail. Sand is spread when leaves fall.",
    "Violin care": "A violin dislikes dry air in heated rooms. Loosen the bow after practice. New strings need days to settle.",
    "Glacier flow": "Ice deforms slowly under its own weight. The middle of a glacier moves fastest. Crevasses open where it is steep.",
}


def corpus(folder: Path) -> str:
    return write_rows(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": t, "text": x} for i, (t, x) in enumerate(FACTS.items())])


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_a_model_the_same_corpus_gives_the_same_queries_and_none_stands_in_its_passage(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    synth = Synth(count=3)
    report = synthesize(source, tmp_path / "one.jsonl", synth=synth, base=None)
    synthesize(source, tmp_path / "two.jsonl", synth=synth, base=None)
    made = rows(tmp_path / "one.jsonl")
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert report.kept == len(made) >= 8
    assert not any(row["query"].lower() in row["document"].lower() for row in made)
    assert "Trams and rails" in {row["query"] for row in made}
    assert not (tmp_path / "one.jsonl.parts").exists()


def test_a_query_that_does_not_find_its_passage_again_is_dropped(tmp_path: Path) -> None:
    content = [{"_id": f"d{i}", "title": t, "text": x} for i, (t, x) in enumerate(FACTS.items())]
    odd = {
        "_id": "odd",
        "title": "Frozen rivers of moving ice",
        "text": "Rosin the bow. Violin strings need days to settle and dislike dry air.",
    }
    source = write_rows(tmp_path / "corpus.jsonl", [*content, odd])
    report = synthesize(source, tmp_path / "out.jsonl", synth=Synth(count=1, top=1))
    queries = {row["query"] for row in rows(tmp_path / "out.jsonl")}
    assert odd["title"] not in queries
    assert "Trams and rails" in queries
    assert report.lost >= 1
    wide = synthesize(source, tmp_path / "wide.jsonl", synth=Synth(count=1, top=10))
    assert wide.lost == 0


def test_a_query_made_for_two_passages_is_dropped(tmp_path: Path) -> None:
    texts = [{"_id": str(i), "title": "About the house", "text": text} for i, text in enumerate(FACTS.values())]
    texts.append({"_id": "own", "title": "Frozen rivers of ice", "text": "A frozen river of ice moves."})
    report = synthesize(write_rows(tmp_path / "c.jsonl", texts), tmp_path / "out.jsonl", synth=Synth(count=1), base=None)
    assert (report.made, report.repeated, report.kept) == (5, 4, 1)


def test_queries_that_differ_in_a_sign_are_made_for_one_passage_each(tmp_path: Path) -> None:
    signed = zip(("", "++", "#", "*"), FACTS.values(), strict=True)
    texts = [{"_id": sign, "title": f"Compile a C{sign} program", "text": text} for sign, text in signed]
    report = synthesize(write_rows(tmp_path / "c.jsonl", texts), tmp_path / "out.jsonl", synth=Synth(count=1), base=None)
    assert (report.made, report.repeated, report.kept) == (4, 0, 4)


def test_each_passages_queries_are_in_the_file_before_the_next_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a buffer, which goes with a process that is killed."""
    from embedft.embedding import synth as module

    lines, from_text, parts = list[int](), module.from_text, tmp_path / "out.jsonl.parts"

    def watched(synth: Synth) -> Any:
        generate = from_text(synth)
        return lambda passage: lines.append(len(parts.read_text().splitlines())) or generate(passage)

    monkeypatch.setattr(module, "from_text", watched)
    synthesize(corpus(tmp_path), tmp_path / "out.jsonl", synth=Synth(), base=None)
    assert lines == [1, 2, 3, 4]


def test_a_passage_does_not_outdo_the_document_that_was_made_of_it(tmp_path: Path) -> None:
    """The passage still holds the words that became the query: were it a rival, nothing would be found again."""
    source = corpus(tmp_path)
    alone = synthesize(source, tmp_path / "out.jsonl", synth=Synth(count=1, top=1))
    assert (alone.made, alone.lost) == (4, 0)


def test_an_address_that_is_none_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no URL"):
        synthesize(corpus(tmp_path), tmp_path / "out.jsonl", synth=Synth(generator="http://[::1/v1"), base=None)


def test_a_limit_draws_from_the_whole_corpus_and_keeps_its_order(tmp_path: Path) -> None:
    passages = [{"_id": f"d{i}", "title": f"The story of {name}{i}", "text": "Here."} for i, name in enumerate(["ant"] * 40 + ["bee"] * 40)]
    drawn: list[list[str]] = []
    for name, content in (("sorted", passages), ("turned", passages[::-1])):
        out = tmp_path / f"{name}.made.jsonl"
        report = synthesize(write_rows(tmp_path / f"{name}.jsonl", content), out, synth=Synth(limit=20), base=None)
        assert report.passages == 20
        drawn.append([row["query"] for row in rows(out)])
    assert drawn[0] == drawn[1][::-1]
    assert drawn[0] == [passage["title"] for passage in passages if passage["title"] in drawn[0]]
    assert 5 <= sum("ant" in query for query in drawn[0]) <= 15


def test_check_mine_and_synth_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "synth.jsonl"
    assert main(["data", "synth", corpus(tmp_path), str(out), "--base", "bm25", "--count", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] >= 8
    assert main(["data", "check", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    out.write_text(out.read_text() + out.read_text().splitlines()[0] + "\n")
    assert main(["data", "check", str(out), "--fix", str(tmp_path / "fixed.jsonl")]) == 1
    assert "duplicates: 1 of" in capsys.readouterr().out
    assert main(["data", "mine", str(tmp_path / "fixed.jsonl"), str(tmp_path / "mined.jsonl"), "--negatives", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] >= 8
    assert (tmp_path / "mined.review.jsonl").is_file()


def test_a_place_where_nothing_can_be_written_is_told_before_a_model_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told when an hour of ranking was to be written, and by the name of a temporary file."""
    monkeypatch.setattr("embedft.base.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"query": f"what of {i}", "document": f"number {i}"} for i in range(8)])
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "out.jsonl", Path("/proc/out.jsonl")):
        for action, source in (("mine", pairs), ("synth", corpus(tmp_path)), ("check", pairs)):
            given = ["--fix", str(place)] if action == "check" else [str(place)]
            assert main(["data", action, source, *given]) == 1
            assert f"{place}: nothing can be written there (" in capsys.readouterr().err


def test_what_encodes_says_how_far_it_is_and_nothing_to_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "synth.jsonl"
    assert main(["data", "synth", corpus(tmp_path), str(out), "--top", "50"]) == 0
    assert capsys.readouterr().err.count(" 0:00 left\n") == 3  # passages, queries, documents
    assert main(["data", "mine", str(out), str(tmp_path / "mined.jsonl")]) == 0
    assert capsys.readouterr().err.count(" 0:00 left\n") == 2
    assert main(["data", "mine", str(out), str(tmp_path / "again.jsonl"), "--json"]) == 0
    assert "left" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [["check", "--fix"], ["mine"], ["synth", "--base", "bm25"]])
def test_rows_are_written_only_under_a_name_that_is_read_as_rows_again(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"query": f"what of the {title}?", "document": text, "title": title, "text": text} for title, text in FACTS.items()]
    source = write_rows(tmp_path / "rows.jsonl", pairs)
    action, *options = command
    assert main(["data", action, source, *options, str(tmp_path / "made.csv")]) == 1
    assert "made.csv: rows are written as JSONL; expected a name that ends in .jsonl or .jsonl.gz" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    packed = tmp_path / "made.jsonl.gz"
    assert main(["data", action, source, *options, str(packed)]) == 0
    problems: list[str] = []
    assert all(record.values["query"] for record in read_records(str(packed), problems))
    assert problems == []
