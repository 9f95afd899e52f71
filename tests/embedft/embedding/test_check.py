"""Faults planted in data are found, and gone from the cleaned copy; clean data has none."""

import json
import random
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from embedft.embedding.check import CheckReport, check
from embedft.embedding.data import load_data
from embedft.errors import DataError
from embedft.recipe import EmbeddingData, EmbeddingEval
from tests.embedft.embedding.reading import found
from tests.fixtures_embedding import write_beir, write_rows

SUBJECTS = ("boiler", "tram", "violin", "glacier", "invoice", "beehive", "turbine", "passport", "orchard", "modem", "ferry", "kiln")


def clean_rows(count: int = 36) -> list[dict[str, Any]]:
    verbs = ("repair", "clean", "choose")
    return [
        {
            "query": f"how to {verbs[i // 12]} a {SUBJECTS[i % 12]}?",
            "document": f"The {SUBJECTS[i % 12]} needs care, number {i}. " + " ".join(SUBJECTS[(i * k) % 12] for k in range(1, 12)),
        }
        for i in range(count)
    ]


def fixed(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[CheckReport, list[dict[str, Any]]]:
    out = tmp_path / "fixed.jsonl"
    report = check(write_rows(tmp_path / "rows.jsonl", rows), fix=out, **options)
    return report, [json.loads(line) for line in out.read_text().splitlines()]


def test_clean_rows_have_no_finding_and_come_out_as_they_went_in(tmp_path: Path) -> None:
    report, rows = fixed(tmp_path, clean_rows())
    assert report.clean
    assert rows == clean_rows()
    assert check(str(tmp_path / "fixed.jsonl")).clean


def test_repeated_empty_and_identical_rows_are_dropped(tmp_path: Path) -> None:
    rows = clean_rows()
    odd = [rows[3], {"query": "  ", "document": "text"}, {"query": "same", "document": "same"}, {"query": "x", "document": None}]
    report, kept = fixed(tmp_path, [*rows, *odd])
    assert found(report, "duplicates").count == 1
    assert found(report, "empty").count == 3
    assert "rows.jsonl:37" in found(report, "duplicates").examples[0]
    assert kept == rows


def test_rows_that_differ_only_in_signs_are_not_repeated(tmp_path: Path) -> None:
    signs = [{"query": f"What does a {sign} b give in Python", "document": f"a {sign} b is what you want here"} for sign in "+-*/"]
    report, kept = fixed(tmp_path, [*clean_rows(), *signs, {**signs[0], "query": signs[0]["query"].upper() + "?"}])
    assert found(report, "duplicates").count == 1
    assert kept == [*clean_rows(), *signs]


def test_a_query_that_the_evaluation_asks_in_other_words_order_or_case_is_leakage(tmp_path: Path) -> None:
    rows = clean_rows()
    test = [
        {"query": "How to repair a boiler", "document": "x"},
        {"query": "please tell me in detail when exactly it is that one has to clean out the old beehive again", "document": "y"},
        {"query": "what is a quark", "document": "z"},
    ]
    near = {"query": "please tell me in detail when exactly it is that one has to clean out the old beehive", "document": "smoke"}
    report, kept = fixed(tmp_path, [*rows, near], eval=write_rows(tmp_path / "test.jsonl", test))
    assert found(report, "leakage").count == 2
    assert "evaluation" in found(report, "leakage").examples[0]
    assert len(kept) == len(rows) - 1


def test_swapped_columns_are_seen_by_their_lengths_and_swapped_back(tmp_path: Path) -> None:
    rows = clean_rows()
    swapped = [{"query": row["document"], "document": row["query"]} for row in rows]
    report, kept = fixed(tmp_path, swapped)
    assert found(report, "swapped_columns").count == len(rows)
    assert kept == rows


def test_queries_somewhat_longer_than_their_documents_are_no_swapped_columns(tmp_path: Path) -> None:
    rows = [{"query": row["query"], "document": row["query"][: round(len(row["query"]) / 1.75)]} for row in clean_rows()]
    assert all(1.5 * len(row["document"]) < len(row["query"]) < 2 * len(row["document"]) for row in rows)
    assert check(write_rows(tmp_path / "rows.jsonl", rows)).clean


def test_a_label_column_is_told_and_irrelevant_rows_go(tmp_path: Path) -> None:
    rows = clean_rows()
    report, kept = fixed(tmp_path, [row | {"label": int(i > 5)} for i, row in enumerate(rows)])
    assert found(report, "label_column").count == len(rows)
    assert kept == rows[6:]


def test_the_same_phrase_in_many_queries_is_cut_off(tmp_path: Path) -> None:
    rows = clean_rows()
    junk = [row | {"query": "Based on the context information, " + row["query"]} if i % 2 else row for i, row in enumerate(rows)]
    report, kept = fixed(tmp_path, junk)
    assert "based on the context information" in found(report, "template").says
    assert found(report, "template").count == 18
    assert [row["query"].lower() for row in kept] == [row["query"].lower() for row in rows]


def test_queries_that_are_one_without_their_template_are_one_in_the_copy(tmp_path: Path) -> None:
    plain = clean_rows(12)
    framed = [{**row, "query": f"according to the passage above {row['query']}"} for row in plain]
    against = [{**row, "document": f"Another answer, {i}.", "negatives": [plain[i]["document"]]} for i, row in enumerate(framed[:2])]
    report, kept = fixed(tmp_path, [*plain, *framed, *against])
    assert found(report, "template").count == 14
    assert found(report, "duplicates").count == 12
    assert found(report, "false_negatives").count == 2
    assert len(kept) == 14
    assert check(str(tmp_path / "fixed.jsonl")).clean


def test_a_phrase_of_chinese_is_longer_than_the_words_of_a_question(tmp_path: Path) -> None:
    subjects = ["锅炉", "小提琴", "冰川", "电车", "蜂箱", "天文台", "面包", "茶叶", "肥皂", "玻璃"]
    rows = [{"query": f"{subject}是什么意思", "document": f"{subject}的说明在这里可以找到"} for subject in subjects]
    assert check(write_rows(tmp_path / "asked.jsonl", rows)).clean
    made = [{**row, "query": f"根据上述文章的内容{row['query']}"} for row in rows]
    assert found(check(write_rows(tmp_path / "made.jsonl", made)), "template").count == len(rows)


def test_many_long_queries_are_searched_for_phrases_in_little_memory(tmp_path: Path) -> None:
    generator = random.Random(7)
    rows = [
        {"query": " ".join(f"w{generator.randrange(9999)}" for _ in range(40)) + " according to the passage", "document": f"d{i} " * 60}
        for i in range(1000)
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    tracemalloc.start()
    try:
        report = check(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found(report, "template").count == 1000
    assert peak < 20 << 20  # 50 MiB where every phrase of every query was counted


def test_texts_beyond_the_limit_are_told_and_stay(tmp_path: Path) -> None:
    rows = [*clean_rows(), {"query": "a long one", "document": "word " * 400}]
    rows.append({"query": "one that the base reads and a run does not", "document": "word " * 150})
    report, kept = fixed(tmp_path, rows, max_length=256)
    assert found(report, "long_document").count == 1
    assert "402 tokens" in found(report, "long_document").examples[0]
    assert len(kept) == len(rows)
    assert check(str(tmp_path / "rows.jsonl"), max_length=402).clean, "402 tokens are read to their end"
    assert found(check(str(tmp_path / "rows.jsonl")), "long_document").count == 2, "by default as many are read as in training"


def test_a_negative_that_answers_the_query_elsewhere_is_taken_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [row | {"negative": clean_rows()[i - 1]["document"]} for i, row in enumerate(clean_rows())]
    rows.append({"query": rows[0]["query"], "document": "another answer", "negative": rows[0]["document"]})
    report, kept = fixed(tmp_path, rows)
    assert found(report, "false_negatives").count == 1
    assert "negatives" not in kept[-1]
    assert kept[0]["negatives"] == [rows[0]["negative"]]


def test_a_cleaned_copy_keeps_the_columns_that_mean_nothing_to_it(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [row | {"id": i, "made": datetime(2026, 1, 1 + i % 28), "label": 1, "score": 1} for i, row in enumerate(clean_rows())]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    check(str(tmp_path / "rows.parquet"), fix=tmp_path / "fixed.jsonl")
    kept = [json.loads(line) for line in (tmp_path / "fixed.jsonl").read_text().splitlines()]
    assert [row["id"] for row in kept] == list(range(36))
    assert kept[3] == {"query": rows[3]["query"], "document": rows[3]["document"], "id": 3, "made": "2026-01-04 00:00:00"}


def test_unreadable_rows_are_told_and_left_out(tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path / "rows.jsonl", clean_rows()))
    path.write_text(path.read_text() + "{not json\n" + json.dumps({"question": "no document"}) + "\n")
    report = check(str(path))
    assert found(report, "unreadable").count == 2
    assert report.rows == 36


def test_a_row_counts_once_whatever_is_wrong_with_it(tmp_path: Path) -> None:
    report = check(write_rows(tmp_path / "rows.jsonl", [{"a": "x", "b": "y"}] * 16))
    assert (found(report, "unreadable").count, found(report, "unreadable").of) == (16, 16)
    assert [example.split(": ")[0] for example in found(report, "unreadable").examples] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]


def test_a_column_that_holds_no_text_is_told_as_training_tells_it(tmp_path: Path) -> None:
    odd = [{"query": 5, "document": "five"}, {"query": "list", "document": ["a", "b"]}]
    path = write_rows(tmp_path / "rows.jsonl", [*clean_rows(), *odd])
    with pytest.raises(DataError) as refused:
        load_data(EmbeddingData(train=path), EmbeddingEval(), scored=False)
    report, kept = fixed(tmp_path, [*clean_rows(), *odd])
    assert list(found(report, "unreadable").examples) == refused.value.problems
    assert "rows.jsonl:37: query is a int; expected text" in refused.value.problems
    assert kept == clean_rows()


def test_evaluation_rows_that_cannot_be_read_hide_no_leak(tmp_path: Path) -> None:
    rows = clean_rows()
    test = write_rows(tmp_path / "test.jsonl", [{"query": 5, "document": "x"}, {"a": "b"}, rows[0]])
    report = check(write_rows(tmp_path / "rows.jsonl", rows), eval=test)
    assert found(report, "leakage").count == 1
    unread = ("test.jsonl:1: query is a int; expected text", "test.jsonl:2: no query columns")
    assert found(report, "unreadable_evaluation").examples == unread


def test_an_evaluation_needs_queries_alone_and_one_without_any_is_an_error(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", clean_rows())
    asked = write_rows(tmp_path / "asked.jsonl", [{"question": clean_rows()[0]["query"]}])
    assert found(check(rows, eval=asked), "leakage").count == 1
    beir = write_beir(tmp_path / "beir", train=4, test=4)
    (Path(beir) / "qrels" / "test.tsv").unlink()
    for unusable in (write_rows(tmp_path / "empty.jsonl", [{"text": "Who asks?"}]), beir):
        with pytest.raises(DataError, match=r"no query to compare with|no test\.tsv"):
            check(rows, eval=unusable)
    assert check(beir).rows == 4  # it has nothing to leak from, and nobody said that it has


def test_nothing_is_overwritten_and_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", clean_rows())
    with pytest.raises(DataError, match="exists already"):
        check(rows, fix=Path(rows))
    with pytest.raises(DataError, match="no rows"):
        check(write_rows(tmp_path / "none.jsonl", []))


def test_columns_are_read_as_the_trainer_reads_them(tmp_path: Path) -> None:
    report, kept = fixed(tmp_path, [row | {"label": "yes" if i > 5 else "no"} for i, row in enumerate(clean_rows())])
    assert found(report, "label_column").count == 36
    assert len(kept) == 30
    report = check(write_rows(tmp_path / "twice.jsonl", [row | {"question": row["query"]} for row in clean_rows()]))
    assert found(report, "unreadable").count == 36
    assert "query, question all name the query" in report.findings[0].examples[0]


def test_a_cleaned_copy_keeps_a_teachers_scores_beside_its_negatives(tmp_path: Path) -> None:
    from embedft.embedding.pairs import parse
    from embedft.records import read_records

    rows = clean_rows()
    others = [rows[(i + 1) % 36]["document"] for i in range(36)]
    given = [row | {"negatives": [other], "scores": [3.0, 1.0]} for row, other in zip(rows, others, strict=True)]
    given[0] |= {"negatives": ["", others[0], rows[0]["document"]], "scores": [3.0, 2.0, 1.0, 0.0]}
    report, kept = fixed(tmp_path, given)
    assert found(report, "bad_negatives").count == 1
    assert all((row["negatives"], row["scores"]) == ([other], [3.0, 1.0]) for row, other in zip(kept, others, strict=True))
    problems: list[str] = []
    assert len(list(parse(read_records(str(tmp_path / "fixed.jsonl"), problems), problems, scored=False, taught=True))) == 36
    assert problems == []


def test_a_copy_without_a_row_is_not_written_and_the_error_says_where_they_went(tmp_path: Path) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes("query,document\nwhat is naïve?,a word\n".encode("latin-1"))
    alike = write_rows(tmp_path / "alike.jsonl", [{"query": "same", "document": "same"}] * 3)
    folder = Path(write_beir(tmp_path / "beir", train=4, test=4))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tnone\t1\n")
    for source, said in (
        (str(latin), "no row is left of latin.csv\n.*unreadable: 1 of 1 .*not UTF-8 .byte 0xef."),
        (alike, "no row is left of alike.jsonl\n.*empty: 3 of 3 have no text on one side"),
        (str(folder), "no row is left of beir\n.*unreadable: 1 of 1 .*document 'none' is not in corpus.jsonl"),
    ):
        with pytest.raises(DataError, match=said):
            check(source, fix=tmp_path / "clean.jsonl")
        assert not (tmp_path / "clean.jsonl").exists()
