"""Reading training and evaluation data: every format, every fault at once, nothing accepted silently."""

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedft.embedding.check import check
from embedft.embedding.data import (
    data_hash,
    load_data,
    make_examples,
    of_pairs,
)
from embedft.embedding.pairs import Example, parse
from embedft.recipe import EmbeddingData, EmbeddingEval
from embedft.records import read_records
from tests.embedft.embedding.reading import ROWS, load, problems
from tests.fixtures_embedding import planted_rows, write_beir, write_rows


def test_several_weighted_sets_are_one_training_set(tmp_path: Path) -> None:
    first, second = (write_rows(tmp_path / f"{i}.jsonl", planted_rows(16, start=160 * i)) for i in (1, 2))
    beir = write_beir(tmp_path / "beir")
    also = [{"train": second, "weight": 0.5}]
    examples, _ = load_data(EmbeddingData.model_validate({"train": first, "eval": beir, "also": also}), EmbeddingEval(), scored=False)
    assert [row.weight for row in examples.rows] == [1.0] * 16 + [0.5] * 16
    even, _ = load_data(
        EmbeddingData.model_validate({"train": first, "eval": beir, "also": [{"train": second}]}), EmbeddingEval(), scored=False
    )
    assert even.hash != examples.hash


@pytest.mark.parametrize("write", [json.dumps, str])
def test_lists_that_a_csv_file_holds_as_text_are_lists(tmp_path: Path, write: Any) -> None:
    """As pandas writes them: one negative, in brackets and quotes, was what a model learned to tell from the answer."""
    rows = [row | {"negatives": [f"it's no {i}", "none"], "scores": [1.0, 0.5, -2]} for i, row in enumerate(ROWS)]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(row | {name: write(row[name]) for name in ("negatives", "scores")} for row in rows)
    found: list[str] = []
    sources = str(tmp_path / "a.csv"), write_rows(tmp_path / "a.jsonl", rows)
    one, other = (list(parse(read_records(source, found), found, scored=False, taught=True)) for source in sources)
    assert one == other
    assert not found
    assert one[3].negatives == ("it's no 3", "none")
    code = ROWS[0] | {"negative": '["x", "y"]', "hard_negatives": "[open", "negatives": "[]"}
    (kept,) = parse(read_records(write_rows(tmp_path / "b.jsonl", [code]), found), found, scored=False)
    assert kept.negatives == ('["x", "y"]', "[open"), "a text by itself, and one that is no list, stay texts"


def test_every_file_format_gives_the_same_examples(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    jsonl = write_rows(tmp_path / "a.jsonl", ROWS)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(Path(jsonl).read_text())
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["query", "document"])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    loaded = [load(str(tmp_path / name)) for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet")]
    assert len({data_hash(*pair) for pair in loaded}) == 1
    assert len(loaded[0][0]) == 36
    assert len(loaded[0][1].queries) == 4, "a tenth of the queries is held out"


def test_swapped_columns_are_the_same_data_because_names_decide(tmp_path: Path) -> None:
    straight = write_rows(tmp_path / "a.jsonl", [{"anchor": r["query"], "positive": r["document"]} for r in ROWS])
    swapped = write_rows(tmp_path / "b.jsonl", [{"positive": r["document"], "anchor": r["query"]} for r in ROWS])
    assert load(straight)[0] == load(swapped)[0]


def test_a_stray_label_column_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    found = problems(write_rows(tmp_path / "a.jsonl", [row | {"label": 0} for row in ROWS]))
    assert len(found) == 1
    assert found[0].startswith("a.jsonl:1: column 'label' would be ignored")
    assert "cosent" in found[0]


def test_a_missing_or_doubled_column_is_named_with_what_was_expected(tmp_path: Path) -> None:
    found = problems(write_rows(tmp_path / "a.jsonl", [{"query": "x", "anchor": "y", "body": "z"}]))
    assert "columns query, anchor all name the query; expected one: drop or rename the others" in found[0]
    assert "no document column among query, anchor, body; expected" in found[1]


def test_all_bad_rows_are_reported_at_once_with_file_and_line(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0])
    bad = [
        good,
        "{not json",
        "[1, 2]",
        '{"query": "", "document": "d"}',
        good,
        '{"query": "q", "document": 7}',
        '{"query": "q", "document": null}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(bad))
    found = problems(str(tmp_path / "a.jsonl"))
    assert [line.split(": ")[0] for line in found] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:6", "a.jsonl:7"]
    assert "not JSON" in found[0]
    assert "a JSON list; expected an object" in found[1]
    assert "query is empty; expected text" in found[2]
    assert "document is a int; expected text" in found[3]
    assert "document is missing" in found[4]


def test_faults_of_training_and_evaluation_data_come_together(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [*ROWS, {"query": " ", "document": "d"}])
    evaluation = write_rows(tmp_path / "test.jsonl", [{"query": "q", "document": ""}])
    assert [line.split(": ")[0] for line in problems(train, eval=evaluation)] == ["train.jsonl:41", "test.jsonl:1"]


def test_csv_rows_of_a_wrong_width_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query,document\na,b\nc\nd,e,f\n")
    assert [line.split(":")[1] for line in problems(str(tmp_path / "a.csv"))] == ["3", "4"]


def test_negatives_come_from_a_list_or_from_numbered_columns(tmp_path: Path) -> None:
    listed = write_rows(tmp_path / "a.jsonl", [row | {"negatives": ["n one", "n two"]} for row in ROWS])
    numbered = write_rows(tmp_path / "b.jsonl", [row | {"negative_1": "n one", "negative_2": "n two"} for row in ROWS])
    assert load(listed)[0] == load(numbered)[0]
    assert load(listed)[0].negatives == 2
    same = problems(write_rows(tmp_path / "c.jsonl", [row | {"negative": row["document"]} for row in ROWS[:3]]))
    assert len(same) == 3
    assert "is the document itself" in same[0]


def test_a_negative_that_answers_its_query_in_another_row_is_refused_unless_a_teacher_scores_it(tmp_path: Path) -> None:
    evaluation = write_rows(tmp_path / "test.jsonl", planted_rows(8, start=500))
    second = {"query": ROWS[0]["query"], "document": "a second answer", "negative": ROWS[0]["document"], "scores": [0.9, 0.8]}
    source = write_rows(tmp_path / "a.jsonl", [*(row | {"negative": "none", "scores": [1.0, 0.0]} for row in ROWS), second])
    (told,) = problems(source, eval=evaluation)
    assert "is its document in another row; `embedft data check --fix` takes it out" in told
    taught, _ = load_data(EmbeddingData(train=source, eval=evaluation), EmbeddingEval(), scored=False, taught=True)
    assert len(taught) == len(ROWS) + 1
    check(source, fix=tmp_path / "fixed.jsonl")
    assert len(load(str(tmp_path / "fixed.jsonl"), eval=evaluation)[0]) == len(ROWS) + 1


def test_scored_pairs_need_a_number_and_their_own_evaluation_data(tmp_path: Path) -> None:
    evaluation = write_rows(tmp_path / "test.jsonl", planted_rows(8, start=500))
    rows = [row | {"score": index / 40} for index, row in enumerate(ROWS)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    assert load(source, eval=evaluation, scored=True)[0].rows[1].score == pytest.approx(1 / 40)
    assert "needs its own evaluation data" in problems(source, scored=True)[0]
    wrong = write_rows(tmp_path / "b.jsonl", [rows[0], rows[1] | {"score": "high"}])
    assert problems(wrong, eval=evaluation, scored=True) == ["b.jsonl:2: score is 'high'; expected a number"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("q1\td1\t²\n".encode(), "train.tsv:34: expected query-id, corpus-id and a whole number"),
        (b"q1\td1\t--1\n", "train.tsv:34: expected query-id, corpus-id and a whole number"),
        (b"q1\td\xe9\t1\n", "train.tsv:34: not UTF-8 (byte 0xe9)"),
    ],
)
def test_a_judgement_that_cannot_be_read_is_named_by_its_line(tmp_path: Path, line: bytes, fault: str) -> None:
    folder = Path(write_beir(tmp_path / "beir", train=32, test=8))
    with (folder / "qrels" / "train.tsv").open("ab") as file:
        file.write(line)
    assert any(fault in problem for problem in problems(str(folder)))


def test_a_beir_folder_with_unknown_ids_and_repeats_is_refused_line_by_line(tmp_path: Path) -> None:
    folder = Path(write_beir(tmp_path / "beir", train=32, test=8))
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("q0\tnowhere\t1\nq999\td1\t1\nq1 d1 1\n")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d0", "text": "again"}\n')
    found = problems(str(folder))
    assert any("corpus.jsonl:17: _id 'd0' occurs twice" in line for line in found)
    assert any("qrels/train.tsv:34: document 'nowhere'" in line for line in found)
    assert any("qrels/train.tsv:35: query 'q999'" in line for line in found)
    assert any("qrels/train.tsv:36: expected query-id" in line for line in found)


def test_repeated_rows_count_once_and_equal_texts_are_one_document(tmp_path: Path) -> None:
    evaluation = write_rows(
        tmp_path / "test.jsonl", [{"query": "q", "document": "a"}, {"query": "q", "document": "b"}, {"query": "p", "document": "a"}]
    )
    examples, retrieval = load(write_rows(tmp_path / "a.jsonl", ROWS + ROWS), eval=evaluation)
    assert len(examples) == 40
    assert len(retrieval.queries) == 2
    assert len(retrieval.documents) == 2
    assert sorted(len(grades) for grades in retrieval.relevant.values()) == [1, 2]


def test_the_data_hash_changes_with_any_text_or_order_of_rows(tmp_path: Path) -> None:
    rows = [Example(row["query"], row["document"]) for row in ROWS]
    hashes = {make_examples(rows).hash, make_examples(rows[::-1]).hash, make_examples([*rows[:-1], Example("q", "d")]).hash}
    assert len(hashes) == 3


def test_the_data_hash_changes_with_whatever_a_row_teaches_and_with_every_judgement() -> None:
    taught = Example("q", "d", ("n",), 0.5, (1.0, 0.0), 1.0)
    changes: list[dict[str, Any]] = [{"query": "r"}, {"document": "e"}, {"negatives": ("m",)}, {"score": 0.6}, {"scores": (1.0, 0.1)}]
    rows = [taught, *(replace(taught, **change) for change in [*changes, {"weight": 2.0}])]
    assert len({make_examples([row]).hash for row in rows}) == len(rows)
    pairs = [Example("a", "x"), Example("b", "y")]
    judged = of_pairs(pairs, extra_documents=()), of_pairs([*pairs, Example("a", "y")], extra_documents=())
    examples = make_examples(pairs)
    assert judged[0].documents == judged[1].documents
    assert len({data_hash(examples), *(data_hash(examples, one) for one in judged), data_hash(examples, *judged)}) == 4


def test_white_space_about_a_text_is_not_part_of_it(tmp_path: Path) -> None:
    spaced = [{"query": f" {row['query']}\n", "document": f"\t{row['document']} ", "negative": " none  "} for row in ROWS]
    plain = [row | {"negative": "none"} for row in ROWS]
    assert load(write_rows(tmp_path / "a.jsonl", spaced)) == load(write_rows(tmp_path / "b.jsonl", plain))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "high", None])
def test_a_score_that_is_no_finite_number_is_named(tmp_path: Path, value: str | None) -> None:
    evaluation = write_rows(tmp_path / "test.jsonl", planted_rows(8, start=500))
    source = write_rows(tmp_path / "a.jsonl", [ROWS[0] | {"score": 1}, ROWS[1] | {"score": value}, ROWS[2] | {"score": "0.5"}])
    assert problems(source, eval=evaluation, scored=True) == [f"a.jsonl:2: score is {value!r}; expected a number"]
    twice = write_rows(tmp_path / "b.jsonl", [row | {"score": 1, "label": 1} for row in ROWS])
    assert "expected exactly one of the columns" in problems(twice, eval=evaluation, scored=True)[0]


@pytest.mark.parametrize("scores", [[1.0], [1.0, 0.5, 0.0], [1.0, "nan"], [1.0, None], 1.0])
def test_a_teacher_scores_the_document_and_each_negative(tmp_path: Path, scores: Any) -> None:
    rows = [row | {"negative": f"no {i}", "scores": [1.0, 0.5]} for i, row in enumerate(ROWS)]
    found: list[str] = []
    for wrong in (rows[3] | {"scores": scores}, ROWS[3] | {"scores": [1.0]}):
        source = write_rows(tmp_path / "a.jsonl", [*rows[:3], wrong])
        assert len(list(parse(read_records(source, found), found, scored=False, taught=True))) == 3
    assert [line.split(": ")[0] for line in found] == ["a.jsonl:4"] * 2
    assert all("expected 2 numbers: document, then negatives" in line for line in found)


def test_what_is_absent_or_unknown_says_what_is_read(tmp_path: Path) -> None:
    assert "there is no such file" in problems(str(tmp_path / "none.jsonl"))[0]
    (tmp_path / "a.txt").write_text("x")
    assert ".txt is not a kind of file that is read here; expected one of .jsonl" in problems(str(tmp_path / "a.txt"))[0]
    (tmp_path / "folder").mkdir()
    assert "no corpus.jsonl" in problems(str(tmp_path / "folder"))[0]
    assert "one file" not in problems(str(tmp_path / "folder"))[0]
    for name in ("june.jsonl", "may.csv"):
        (tmp_path / "folder" / name).touch()
    assert "or one file of rows, such as its june.jsonl (data.also names" in problems(str(tmp_path / "folder"))[0]


def test_a_hub_dataset_that_cannot_be_had_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def absent(name: str, config: str | None, *, split: str, revision: str | None) -> Any:
        assert (name, config, revision) == ("owner/set", "small", "v1")
        raise FileNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    assert "hub did not give split 'train': no such dataset" in problems("hf://owner/set:small@v1")[0]


def test_a_hub_dataset_is_read_by_its_column_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    assert len(load("hf://owner/set", eval=write_rows(tmp_path / "t.jsonl", planted_rows(4, start=900)))[0]) == 40
