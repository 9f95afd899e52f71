"""A BEIR folder that is checked and copied clean keeps its grades, its splits and its form."""

import gzip
import json
from pathlib import Path

import pytest

from embedft.embedding.check import check
from embedft.embedding.data import load_data
from embedft.errors import DataError
from embedft.recipe import EmbeddingData, EmbeddingEval
from tests.embedft.embedding.reading import found
from tests.fixtures_embedding import write_beir, write_rows


def test_a_cleaned_beir_folder_keeps_its_grades(tmp_path: Path) -> None:
    folder = Path(write_beir(tmp_path / "beir", train=8, test=4))
    lines = (folder / "qrels" / "train.tsv").read_text().splitlines()
    graded = [lines[0], *(f"{line.rpartition(chr(9))[0]}\t{2 + number % 2}" for number, line in enumerate(lines[1:]))]
    (folder / "qrels" / "train.tsv").write_text("\n".join(graded) + "\n")
    check(str(folder), fix=tmp_path / "fixed")
    assert (tmp_path / "fixed" / "qrels" / "train.tsv").read_text().splitlines()[1:] == graded[1:]


def test_a_beir_folder_is_checked_against_its_own_test_split_and_copied_clean(tmp_path: Path) -> None:
    folder = Path(write_beir(tmp_path / "beir", train=40, test=12))
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    queries[1]["text"] = queries[45]["text"].upper() + "!"
    write_rows(folder / "queries.jsonl", queries)
    report = check(str(folder), fix=tmp_path / "fixed")
    assert found(report, "leakage").count >= 1
    assert "q1/d1" in found(report, "leakage").examples[0]
    kept = (tmp_path / "fixed" / "qrels" / "train.tsv").read_text().splitlines()[1:]
    assert "q1\td1\t1" not in kept
    assert len(kept) == report.kept
    assert (tmp_path / "fixed" / "qrels" / "test.tsv").read_text() == (folder / "qrels" / "test.tsv").read_text()


def test_a_beir_folder_with_a_dev_split_alone_is_checked_against_that(tmp_path: Path) -> None:
    folder = Path(write_beir(tmp_path / "beir", train=40, test=12))
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "dev.tsv")
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    queries[1]["text"] = queries[45]["text"]
    write_rows(folder / "queries.jsonl", queries)
    assert "q1/d1" in found(check(str(folder)), "leakage").examples[0]


def test_of_a_beir_folder_no_more_is_promised_and_changed_than_its_judgements(tmp_path: Path) -> None:
    folder = Path(write_beir(tmp_path / "beir", train=40, test=12))
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    for query in queries:
        query["text"] = f"according to the passage above {query['text']}"
    write_rows(folder / "queries.jsonl", queries)
    graded = (folder / "qrels" / "train.tsv").read_text().replace("q1\td1\t1", "q1\td1\t3")
    (folder / "qrels" / "train.tsv").write_text(graded)
    report = check(str(folder), fix=tmp_path / "fixed")
    assert found(report, "template").remedy == "", "queries are copied as they stand"
    assert (tmp_path / "fixed" / "queries.jsonl").read_text() == (folder / "queries.jsonl").read_text()
    kept = (tmp_path / "fixed" / "qrels" / "train.tsv").read_text().splitlines()
    assert set(kept) <= set(graded.splitlines())
    assert "q1\td1\t3" in kept


@pytest.mark.parametrize("packed", [False, True])
def test_lines_of_a_beir_folder_that_nothing_reads_are_left_out_of_its_copy(tmp_path: Path, packed: bool) -> None:
    folder = Path(write_beir(tmp_path / "beir", train=40, test=12))
    with (folder / "queries.jsonl").open("a") as file:
        file.write("\n  \n")
    whole = {stem: (folder / f"{stem}.jsonl").read_text() for stem in ("corpus", "queries")}
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('not JSON\n{"_id": 5, "text": "a number for an id"}\n{"_id": "d0", "text": "twice"}\n')
    if packed:
        (folder / "corpus.jsonl.gz").write_bytes(gzip.compress((folder / "corpus.jsonl").read_bytes()))
        (folder / "corpus.jsonl").unlink()
    report = check(str(folder), fix=tmp_path / "fixed")
    assert (found(report, "unreadable").count, found(report, "unreadable").remedy) == (3, "left out")
    copied = tmp_path / "fixed" / ("corpus.jsonl.gz" if packed else "corpus.jsonl")
    rows = (gzip.decompress(copied.read_bytes()) if packed else copied.read_bytes()).decode().splitlines()
    assert [json.loads(row) for row in rows] == [json.loads(row) for row in whole["corpus"].splitlines()]
    assert (tmp_path / "fixed" / "queries.jsonl").read_text() == whole["queries"], "what is read whole stays as it is"
    load_data(EmbeddingData(train=str(tmp_path / "fixed")), EmbeddingEval(), scored=False)


def test_a_folder_is_not_copied_into_itself(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "beir", train=40, test=12)
    with pytest.raises(DataError, match="name a place beside it"):
        check(folder, fix=Path(folder) / "fixed")
