import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from embedft.causal_lm.data import Message, Row, data_hash, read_rows
from embedft.causal_lm.train import Split, read_split
from embedft.errors import DataError
from embedft.recipe import parse_recipe
from tests.fixtures_lm import write_jsonl

PAIR = {"prompt": "two and two?", "completion": "four"}
EXPECTED = (Message("user", "two and two?"), Message("assistant", "four"))


def test_every_format_becomes_the_same_conversation(tmp_path: Path) -> None:
    listed = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
    for record in (PAIR, {"messages": listed}, {"instruction": "two and two?", "output": "four"}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n\n")
        assert [row.messages for row in read_rows(str(tmp_path / "rows.jsonl"))] == [EXPECTED]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [PAIR, {"prompt": 'a, "b"\nc', "completion": "naïve"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [read_rows(str(tmp_path / name)) for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet")]
    assert all(rows == read[0] for rows in read)
    assert read[0][1].answer == "naïve"


def test_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "Translate.", "input": "Haus", "output": "house"}) + "\n")
    assert read_rows(str(tmp_path / "a.jsonl"))[0].messages[0].content == "Translate.\n\nHaus"


def test_all_bad_rows_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    lines = [json.dumps(PAIR), "{not json", "[1]", json.dumps({"prompt": "x"}), json.dumps({"prompt": "x", "completion": " "})]
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, json.dumps({"prompt": None, "completion": "y"})]))
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / "bad.jsonl"))
    problems = caught.value.problems
    assert [problem.split(": ")[0] for problem in problems] == [f"bad.jsonl:{line}" for line in (2, 3, 4, 5, 6)]
    assert "expected one JSON object a line" in problems[0]
    assert "expected an object" in problems[1]
    assert "no 'completion'" in problems[2]
    assert "'completion' is empty" in problems[3]
    assert "'prompt' is a NoneType" in problems[4]


ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "expected \\[{role, content}"),
        ([{"role": "user", "content": "a"}], "the last message is by the user"),
        ([{"role": "robot", "content": "a"}], "expected one of system, user, assistant"),
        ([{"role": "assistant"}], "message 1: no 'content'"),
        ([{"role": "assistant", "content": "a"}], "the only message is the answer"),
        ([ASKED, ANSWERED | {"tool_calls": [{"id": "1"}]}], "message 2: 'tool_calls' is not read, and would not be learnt"),
        ([ASKED, ANSWERED | {"reasoning_content": "for it is hot"}], "message 2: 'reasoning_content' is not read"),
        ([ASKED, ANSWERED | {"weight": 0.5}], "message 2: 'weight' is 0.5, expected 0 or 1"),
        ([ASKED, ANSWERED | {"train": False}], "the last answer is not to be learnt"),
    ],
)
def test_conversations_that_cannot_be_learnt_are_refused(tmp_path: Path, messages: list[dict[str, Any]], fault: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match=fault):
        read_rows(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, ANSWERED], "tools": [{"type": "function"}]},
        PAIR | {"system": "You are a pirate."},
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
    ],
)
def test_a_row_that_other_trainers_would_put_more_into_the_prompt_of_is_refused(tmp_path: Path, record: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR if "prompt" in record else {key: record[key] for key in list(record)[:-1]}, record])
    column = list(record)[-1]
    with pytest.raises(DataError, match=rf"a\.jsonl:2: '{column}' is not read, and what it says would not be in the prompt"):
        read_rows(str(path))
    empty = write_jsonl(tmp_path / "a.jsonl", [record | {column: None}, record | {column: ""}])
    assert len(read_rows(str(empty))) == 2


@pytest.mark.parametrize("marked", [{"weight": 0}, {"train": False}, {"training": False}])
def test_an_answer_may_say_that_it_is_not_learnt(tmp_path: Path, marked: dict[str, Any]) -> None:
    plain = [ASKED, ANSWERED, ASKED, ANSWERED | {"weight": 1}]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": plain}, {"messages": [ASKED, ANSWERED | marked, *plain[2:]]}])
    learnt, unlearnt = read_rows(str(tmp_path / "a.jsonl"))
    assert [message.learnt for message in learnt.messages] == [True] * 4
    assert [message.learnt for message in unlearnt.messages] == [True, False, True, True]
    assert data_hash([learnt]) != data_hash([unlearnt])


def test_unknown_columns_and_files_are_refused_with_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(DataError, match="expected prompt and completion"):
        read_rows(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="there is no such file"):
        read_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"expected one of \.jsonl"):
        read_rows(str(tmp_path / "a.txt"))


def test_a_csv_row_with_a_field_too_few_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nx,y\nz\n")
    with pytest.raises(DataError, match=r"a\.csv:3: not as many fields"):
        read_rows(str(tmp_path / "a.csv"))


def test_the_data_hash_changes_with_any_text_and_with_the_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR | {"completion": "five"}) + "\n")
    rows = read_rows(str(tmp_path / "a.jsonl"))
    assert len({data_hash(rows), data_hash(rows[:1]), data_hash(rows[:1], rows[1:]), data_hash(rows[::-1])}) == 4


def test_the_hash_of_a_run_is_of_its_validation_rows_too() -> None:
    rows = [Row(str(i), (Message("user", "a"), Message("assistant", f"{i}"))) for i in range(3)]
    splits = Split(rows, []), Split(rows, rows[:1]), Split(rows, [], rows[:1]), Split(rows, [], rows[1:])
    assert len({split.hash for split in splits}) == 4


def test_rows_have_ids_of_their_own_and_no_more_are_read_than_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR | {"id": name} for name in ("x", "y", "x")])
    assert [row.id for row in read_rows(str(path))] == ["0", "1", "2"], "one id twice names no row"
    assert [row.id for row in read_rows(str(path), limit=2)] == ["x", "y"]
    assert len(read_rows(str(path), limit=3)) == 3


def test_further_references_are_read_and_change_the_data_hash(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "references": ["b", "c"]}\n{"prompt": "a", "completion": "b"}\n')
    first, second = read_rows(str(path))
    assert (first.expected, second.expected) == (("b", "c"), ("b",))
    assert data_hash([first]) != data_hash([second])
    path.write_text('{"prompt": "a", "completion": "b", "references": [1]}\n')
    with pytest.raises(DataError, match="'references' is not a text or a list of texts"):
        read_rows(str(path))


def test_eval_rows_are_drawn_from_the_whole_file(tmp_path: Path) -> None:
    """A file sorted by its answers: the first forty rows would all be of one kind."""
    rows = [{"prompt": f"{number}", "completion": answer} for answer in ("yes", "no") for number in range(200)]
    path = write_jsonl(tmp_path / "sorted.jsonl", rows)
    content = {
        "task": "causal_lm",
        "name": "s",
        "base": {"model": "seed-lm"},
        "data": {"train": str(path), "eval": str(path)},
        "eval": {"rows": 40},
    }
    split = read_split(parse_recipe(content))  # pyright: ignore[reportArgumentType]
    drawn = [row.answer for row in split.test]
    assert len(drawn) == 40
    assert 10 <= drawn.count("yes") <= 30
    assert [row.id for row in split.test] == sorted((row.id for row in split.test), key=int)
    assert split.test == read_split(parse_recipe(content)).test  # pyright: ignore[reportArgumentType]
    assert len(split.train) == 400
