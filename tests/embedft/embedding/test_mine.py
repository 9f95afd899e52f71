"""Mined negatives are hard and do not answer; what might answer goes to a person."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedft.embedding.data import load_data
from embedft.embedding.mine import MineReport, Mining, mine
from embedft.errors import BaseMismatch, DataError
from embedft.recipe import EmbeddingData, EmbeddingEval
from tests.embedft.adapter_fixtures import make_adapter
from tests.fixtures_embedding import planted_rows, tiny_encoder, write_rows

FRUITS = ("apple", "banana", "cherry", "damson", "elderberry", "fig", "grape", "hawthorn", "kiwi", "lemon", "mango", "nectarine")
PLACES = ("cellar", "fridge", "pantry", "basket", "bowl", "drawer", "attic", "crate", "sack", "shed", "jar", "box")

ANYTHING = {"relative": -9.0, "absolute": -9.0}  # margins that keep nothing out


def answer(fruit: str) -> str:
    """Alike enough to be hard, and not nearly the same."""
    i = FRUITS.index(fruit)
    places = " then the ".join(PLACES[(i * k + k) % 12] for k in (1, 5, 7, 11))
    return f"A ripe {fruit} stays fresh for {i + 3} days in the {places}."


def beir(folder: Path, *, extra: dict[str, str] | None = None, second: bool = False) -> str:
    """One question and one answer a fruit; `extra` documents that no judgement knows; `second`: a second judged answer."""
    (folder / "qrels").mkdir(parents=True)
    documents = {f"d{i}": answer(fruit) for i, fruit in enumerate(FRUITS)} | (extra or {})
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(len(FRUITS)))]
    if second:
        documents["second"] = "An apple bought ripe will last fourteen days in the cellar."
        lines.append("q0\tsecond\t1")
    write_rows(folder / "corpus.jsonl", [{"_id": name, "title": "", "text": text} for name, text in documents.items()])
    write_rows(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"how long does a ripe {f} stay fresh?"} for i, f in enumerate(FRUITS)])
    (folder / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n")
    return str(folder)


def mined(source: str, tmp_path: Path, **options: Any) -> tuple[MineReport, list[dict[str, Any]], list[dict[str, Any]]]:
    out, review = tmp_path / "mined.jsonl", tmp_path / "review.jsonl"
    settings = Mining(**{"negatives": 3, "depth": 8} | options.pop("mining", {}))
    report = mine(source, out, mining=settings, review=review, **options)
    return report, *([json.loads(line) for line in path.read_text().splitlines()] for path in (out, review))


def test_negatives_are_near_and_never_a_known_answer(tmp_path: Path) -> None:
    report, rows, _ = mined(beir(tmp_path / "beir", second=True), tmp_path, mining={"relative": 0.0})
    assert len(rows) == len(FRUITS) + 1
    assert all(len(row["negatives"]) == len(set(row["negatives"])) == 3 for row in rows)
    for row in rows:
        fruit = row["query"].split()[5]
        assert not any(fruit in text for text in row["negatives"]), "neither its document nor its second one"
    assert report.negatives == 3 * len(rows)
    assert report.short == 0
    asked = write_rows(tmp_path / "asked.jsonl", planted_rows(2))
    examples, _ = load_data(EmbeddingData(train=report.path, eval=asked), EmbeddingEval(), scored=False)
    assert examples.negatives == 3


def test_both_files_may_go_to_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    out, review = tmp_path / "new" / "mined.jsonl", tmp_path / "other" / "review.jsonl"
    mine(beir(tmp_path / "beir"), out, mining=Mining(negatives=1, depth=8, relative=0.0), review=review)
    assert out.exists()
    assert review.exists()


def test_an_unjudged_copy_of_the_answer_is_no_negative(tmp_path: Path) -> None:
    copy = {"copy": answer("fig").replace(" a ", " the ").replace("A ripe", "a RIPE") + "!"}
    report, rows, _ = mined(beir(tmp_path / "beir", extra=copy), tmp_path, mining={"relative": 0.0})
    row = next(row for row in rows if " fig " in row["query"])
    assert copy["copy"] not in row["negatives"]
    assert report.kept_out["says what the answer says"] >= 1


def test_what_outranks_the_answer_everywhere_goes_to_review_and_not_into_training(tmp_path: Path) -> None:
    better = "How long does a ripe fig stay fresh? Four days, if you are lucky."
    _, rows, review = mined(beir(tmp_path / "beir", extra={"better": better}), tmp_path)
    assert all(better not in row["negatives"] for row in rows if " fig " in row["query"])
    doubt = next(line for line in review if line["candidate"] == better)
    assert doubt["answer"] == answer("fig")
    assert all(doubt["ranks"][name] < doubt["answer_ranks"][name] for name in ("base", "bm25"))
    assert doubt["fused"] > doubt["answer_fused"]


def test_the_margins_keep_out_what_scores_too_near(tmp_path: Path) -> None:
    source = beir(tmp_path / "beir")
    reports, found = list[MineReport](), list[list[dict[str, Any]]]()
    for margins in ({"relative": 0.3}, {"relative": 0.0, "absolute": 0.3}, {"relative": 0.0, "absolute": 0.02}):
        report, rows, _ = mined(source, tmp_path, mining=margins)
        reports.append(report)
        found.append(rows)
        for name in ("mined.jsonl", "review.jsonl"):
            (tmp_path / name).unlink()
    kept_out = [report.kept_out.get("scores too near to the answer", 0) for report in reports]
    assert min(kept_out[:2]) > kept_out[2]
    from embedft.base import BaseSpec, base_folder, load_model
    from embedft.encode import Encoder, EncodeSettings

    folder = base_folder(BaseSpec("minilm"))
    encoder = Encoder(load_model(folder, task="embedding"), folder, EncodeSettings("mean", True, 64))
    for rows, most in zip(found, (lambda best: 0.7 * best, lambda best: best - 0.3, lambda best: best - 0.02), strict=True):
        for row in rows:
            query, document, *negatives = encoder.encode([row["query"], row["document"], *row["negatives"]])
            assert max(query @ negative for negative in negatives) <= most(query @ document) + 1e-5


def test_what_the_rankers_leave_open_is_drawn_at_random_and_the_same_every_time(tmp_path: Path) -> None:
    source, made = beir(tmp_path / "beir"), list[list[dict[str, Any]]]()
    for seed in (7, 7, 8):
        report, rows, _ = mined(source, tmp_path, mining={"depth": 1, "relative": 0.0, "seed": seed})
        assert report.filled >= 2 * len(FRUITS), "a ranker lists no more than its depth"
        assert report.negatives == 3 * len(FRUITS)
        made.append(rows)
        for name in ("mined.jsonl", "review.jsonl"):
            (tmp_path / name).unlink()
    assert made[0] == made[1] != made[2]


def test_too_small_a_corpus_gives_fewer_and_says_so(tmp_path: Path) -> None:
    rows = [{"query": f"what is a {f}?", "document": f"a {f} is a fruit that grows on trees number {i}"} for i, f in enumerate(FRUITS[:3])]
    report, lines, _ = mined(write_rows(tmp_path / "rows.jsonl", rows), tmp_path, mining={"negatives": 5, "relative": 0.0})
    assert report.short == 3
    assert all(len(line["negatives"]) <= 2 for line in lines)


def test_a_cross_encoder_strikes_what_it_prefers_and_its_scores_are_written(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tiny_encoder(tmp_path / "cross", pooling="mean")
    torch.manual_seed(1)
    config = BertConfig.from_pretrained(folder, num_labels=1, initializer_range=0.4)
    BertForSequenceClassification(config).save_pretrained(folder)
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink(missing_ok=True)
    source = write_rows(tmp_path / "rows.jsonl", planted_rows(16))
    report, rows, _ = mined(source, tmp_path, mining=ANYTHING, cross_encoder=str(folder))
    assert report.rows == len(rows) > 0
    assert report.kept_out["the cross-encoder prefers it"] > 0
    assert report.negatives > 0
    for row in rows:
        assert len(row["scores"]) == 1 + len(row["negatives"])
        assert all(score < row["scores"][0] for score in row["scores"][1:])
    with pytest.raises(DataError, match="cannot be loaded"):
        mine(beir(tmp_path / "other"), tmp_path / "x.jsonl", mining=Mining(), cross_encoder=str(tmp_path / "absent"))
    plain = tiny_encoder(tmp_path / "plain", pooling="mean")
    (plain / "modules.json").unlink()
    with pytest.raises(DataError, match="no sequence classifier"):  # its scores would be drawn at random
        mine(beir(tmp_path / "third"), tmp_path / "x.jsonl", mining=Mining(), cross_encoder=str(plain))


def test_a_rows_own_negatives_stay_and_others_come_after_them(tmp_path: Path) -> None:
    rows = [
        {"query": f"how long does a ripe {f} stay fresh?", "document": answer(f), "negative": f"A {f} is sold in a box."} for f in FRUITS
    ]
    report, lines, _ = mined(write_rows(tmp_path / "rows.jsonl", rows), tmp_path, mining={"relative": 0.0})
    assert report.negatives == 3 * len(FRUITS)
    for row, line in zip(rows, lines, strict=True):
        assert line["negatives"][0] == row["negative"]
        assert len(set(line["negatives"])) == 4


def test_a_rows_own_negative_that_answers_its_query_in_another_row_is_refused(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"query": f"how long does a ripe {f} stay fresh?", "document": answer(f)} for f in FRUITS]
    rows.append({"query": rows[0]["query"], "document": "fourteen days", "negative": answer(FRUITS[0])})
    with pytest.raises(DataError, match="is its document in another row"):
        mined(write_rows(tmp_path / "rows.jsonl", rows), tmp_path)


def test_a_pair_without_a_negative_is_not_written_for_it_would_cost_all_others_theirs(tmp_path: Path) -> None:
    alone = [{"query": "what is a comet?", "document": "a comet is ice"}, {"query": "what is a comet?", "document": "a comet is dust"}]
    other = [{"query": "is a comet ice?", "document": "a comet is ice"}]
    report, lines, _ = mined(write_rows(tmp_path / "rows.jsonl", [*alone, *other]), tmp_path, mining=ANYTHING)
    assert [line["query"] for line in lines] == ["is a comet ice?"]
    assert (report.rows, report.kept_out["pairs without a negative, not written"]) == (1, 2)
    with pytest.raises(DataError, match="no pair has a negative left"):
        mine(write_rows(tmp_path / "alone.jsonl", alone), tmp_path / "none.jsonl", mining=Mining())


def test_an_adapter_ranks_only_on_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    one, other = (tiny_encoder(tmp_path / name, pooling=name) for name in ("mean", "cls"))
    adapter = str(make_adapter(tmp_path / "adapter", model=str(one)))
    with pytest.raises(BaseMismatch):
        mined(beir(tmp_path / "beir"), tmp_path, adapter=adapter, base=str(other))
    report, _, review = mined(str(tmp_path / "beir"), tmp_path, adapter=adapter, mining=ANYTHING)
    assert report.rows == len(FRUITS)
    assert all(set(line["ranks"]) == {"bm25", "base", "adapter"} for line in review)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        mine(beir(tmp_path / "beir"), out, mining=Mining())
