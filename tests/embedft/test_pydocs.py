"""Retrieval sets and LM tasks made from installed packages."""

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from embedft.errors import DataError
from embedft.installed import first_sentence, functions_in
from embedft.pydocs import PydocsReport, make_pydocs

PACKAGES = ("accelerate", "fsspec")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PydocsReport]:
    out = tmp_path_factory.mktemp("made") / "pydocs"
    return out, make_pydocs(out, limit=300, packages=PACKAGES)


def test_what_is_cut_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any, **__: Any) -> None:
        assert [*tmp_path.rglob("corpus.jsonl")]
        raise KeyboardInterrupt

    monkeypatch.setattr("embedft.pydocs._write_lm", cut)
    with pytest.raises(KeyboardInterrupt):
        make_pydocs(tmp_path / "out", limit=30, packages=PACKAGES)
    assert not [*tmp_path.iterdir()]


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def judged(path: Path) -> list[tuple[str, str]]:
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    assert header == "query-id\tcorpus-id\tscore"
    return [(line.split("\t")[0], line.split("\t")[1]) for line in lines]


@pytest.mark.parametrize("name", ["code", "readme"])
def test_a_retrieval_set_is_whole_and_its_test_queries_are_not_trained_on(made: tuple[Path, PydocsReport], name: str) -> None:
    out, _ = made
    corpus = {row["_id"]: row["text"] for row in rows(out / name / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in rows(out / name / "queries.jsonl")}
    train, test = judged(out / name / "qrels" / "train.tsv"), judged(out / name / "qrels" / "test.tsv")
    assert train
    assert test
    assert {q for q, _ in train}.isdisjoint(q for q, _ in test)
    assert {d for _, d in train}.isdisjoint(d for _, d in test)
    assert {q for q, _ in train + test} == set(queries)
    assert {d for _, d in train + test} == set(corpus)
    assert len(set(corpus.values())) == len(corpus)
    assert len({q.casefold() for q in queries.values()}) == len(queries)


def test_both_lm_tasks_ask_the_same_and_want_different_answers(made: tuple[Path, PydocsReport]) -> None:
    out, report = made
    for part in ("train", "test"):
        package, argument = rows(out / "lm_package" / f"{part}.jsonl"), rows(out / "lm_argument" / f"{part}.jsonl")
        assert [row["prompt"] for row in package] == [row["prompt"] for row in argument]
        assert len(package) == report.lm[part]
        answers = [row["completion"].strip() for row in package]
        assert {answers.count(name) for name in PACKAGES} == {len(answers) // 2}
        for row in argument:
            signature = row["prompt"].split("\n")[0]
            names = next(functions_in(f'{signature}:\n    """Doc."""\n    pass\n', package="x")).arguments
            assert row["completion"] == f" {names[0]}"
            assert row["completion"].strip() not in {"self", "cls"}
    train, test = rows(out / "lm_package" / "train.jsonl"), rows(out / "lm_package" / "test.jsonl")
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in test)


def test_the_same_seed_gives_the_same_bytes_and_no_path_of_the_machine(made: tuple[Path, PydocsReport], tmp_path: Path) -> None:
    out, _ = made
    make_pydocs(tmp_path / "again", limit=300, packages=PACKAGES)
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert len(files) == 12
    for name in files:
        text = (out / name).read_bytes()
        assert text == (tmp_path / "again" / name).read_bytes()
        assert sysconfig.get_path("purelib").encode() not in text
        assert str(Path.home()).encode() + b"/" not in text


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="not an empty folder"):
        make_pydocs(tmp_path, packages=PACKAGES)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no_such_package_here"):
        make_pydocs(tmp_path / "out", packages=["no_such_package_here"])


def test_code_comes_without_its_docstring() -> None:
    source = (
        'class A:\n    def f(self, x: int, *, y=2):\n        """Add things. Slowly.\n\n        More."""\n        return x + y  # "yes"\n'
    )
    (found,) = functions_in(source, package="p")
    assert found.code == 'def f(self, x: int, *, y=2):\n    return x + y  # "yes"'
    assert found.summary == "Add things."
    assert found.signature == "def f(self, x: int, *, y=2)"
    assert found.arguments == ("x", "y")


def test_a_summary_is_the_first_sentence_on_one_line() -> None:
    assert first_sentence("\n    Give back\n    the sum. And more.\n\n    Details.") == "Give back the sum."
