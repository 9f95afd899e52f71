"""One reader for retrieval and language models alike."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from embedft.errors import DataError
from embedft.records import read_records

ROWS = [{"a": "x", "b": "naïve"}, {"a": 'said "so"', "b": "1,\n2"}]


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    problems: list[str] = []
    return [dict(found.values) for found in read_records(str(path), problems)], problems


def write(path: Path, *, mark: str = "") -> Path:
    if ".csv" in path.name:
        with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
            file.write(mark)
            writer = csv.DictWriter(file, ["a", "b"])
            writer.writeheader()
            writer.writerows(ROWS)
        return path
    text = mark + (json.dumps(ROWS) if path.suffix == ".json" else "".join(json.dumps(row) + "\r\n" for row in ROWS))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz"])
def test_every_kind_of_file_gives_the_same_rows_with_a_byte_order_mark_or_without(tmp_path: Path, name: str, mark: str) -> None:
    assert read(write(tmp_path / name, mark=mark)) == (ROWS, [])


def test_a_quote_left_open_is_named_and_swallows_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n1,2\n3,"4\n5,6\n')
    rows, problems = read(tmp_path / "a.csv")
    assert rows == [{"a": "1", "b": "2"}]
    assert problems == ["a.csv:3: not CSV: unexpected end of data"]


def test_a_semicolon_or_a_tab_beside_commas_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b; c\n1;\t2,3\n")
    assert read(tmp_path / "a.csv") == ([{"a": "1;\t2", "b; c": "3"}], [])
    (tmp_path / "a.csv").write_text("")
    assert read(tmp_path / "a.csv") == ([], [])


def test_a_long_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1," + "x" * 300_000 + "\n")
    assert len(read(tmp_path / "a.csv")[0][0]["b"]) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"{}", "a.json: a JSON dict; expected a list of objects"),
        ("a.json", b"[1]", "a.json[1]: a JSON int; expected an object"),
        ("a.json", b"[", "a.json: not JSON"),
        ("a.json", b"[" * 100_000, "a.json: nested too deep"),
        ("a.json", rb'[{"a": ["\ud83d"]}]', "a.json[1]: holds half a character"),
        ("a.jsonl", b'{"a": 1}\n\xff\n', "a.jsonl:2: not UTF-8 (byte 0xff)"),
        ("a.csv", b"a,b\n\xff,1\n", "a.csv:2: not UTF-8 (byte 0xff)"),
        ("a.json", b'["\xff"]', "a.json: not UTF-8 (byte 2): convert it"),
        ("a.jsonl", b'{"query": "x"\n', "a.jsonl:1: not JSON (Expecting ',' delimiter at column 14)"),
        ("a.csv", b"query;document\na;b, c\nd;e, f\n", "a.csv: its fields are delimited by a semicolon; expected a comma"),
        ("a.csv", b'"query"\t"document"\n"a, b"\t"c"\n', "a.csv: its fields are delimited by a tab; expected a comma"),
        ("a.csv", b"query,answer,answer\na,b,c\n", "a.csv:1: two columns are named 'answer'; expected a name for each"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: stops being readable"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0)[:10] + b"\xff" * 20, "a.jsonl.gz: stops being readable"),
        ("a.parquet", b"no parquet", "a.parquet: not a Parquet file"),
    ],
)
def test_what_cannot_be_read_is_a_problem_with_its_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    (problem,) = read(tmp_path / name)[1]
    assert problem.startswith(said)


def test_what_is_no_such_file_says_what_is_read(tmp_path: Path) -> None:
    for name in ("a.xlsx", "a"):
        (tmp_path / name).touch()
    for path, said in (
        (tmp_path / "none.csv", "there is no such file"),
        (tmp_path / "none", "there is no such file"),
        (tmp_path / "a.xlsx", r"\.xlsx is not a kind of file .*expected one of \.jsonl, .*or hf://name"),
        (tmp_path / "a", "without an ending"),
        (tmp_path, "a folder; expected a file"),
    ):
        with pytest.raises(DataError, match=said):
            read(path)


def test_a_hub_sources_split_is_its_own_or_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str, revision: str | None) -> list[dict[str, str]]:
        asked.append((name, config, split, revision))
        return [{"a": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("hf://owner/set", "hf://owner/set:small@v1#dev"):
        (found,) = read_records(source, [], split="test")
        assert found.where == f"owner/set:{asked[-1][2]}:1"
    assert asked == [("owner/set", None, "test", None), ("owner/set", "small", "dev", "v1")]
