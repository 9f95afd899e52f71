"""Retrieval metrics against sentence-transformers' evaluator, by hand, and the BM25 baseline."""

from pathlib import Path

import numpy as np
import pytest

from embedft.base import BaseSpec, load_base, load_model
from embedft.embedding.data import RetrievalSet, load_retrieval
from embedft.embedding.evaluate import METRICS, Towers, bm25_baseline, bm25_top, compare_towers, evaluate_retrieval, fuse, rank, score
from embedft.embedding.proof import comparison
from embedft.encode import Encoder, EncodeSettings
from embedft.methods import attach
from embedft.recipe import AdapterSection
from tests.fixtures_embedding import planted_rows, tiny_encoder, write_beir, write_rows


def test_metrics_agree_with_sentence_transformers_evaluator(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    folder = tiny_encoder(tmp_path / "base", pooling="mean")
    rows = planted_rows(48)
    extra = [{"query": row["query"], "document": other["document"]} for row, other in zip(rows[:20], rows[16:36], strict=True)]
    data = load_retrieval(write_rows(tmp_path / "pairs.jsonl", rows + extra))
    ours = evaluate_retrieval(Encoder(load_model(folder, task="embedding"), folder, EncodeSettings("mean", True, 32)), data).metrics
    relevant = {query: set(grades) for query, grades in data.relevant.items()}
    evaluator = InformationRetrievalEvaluator(dict(data.queries), dict(data.documents), relevant, show_progress_bar=False, write_csv=False)
    theirs = evaluator(SentenceTransformer(str(folder), device="cpu"))
    for name, key in {
        "ndcg@10": "ndcg@10",
        "mrr@10": "mrr@10",
        "hit@1": "accuracy@1",
        "hit@5": "accuracy@5",
        "hit@10": "accuracy@10",
        "recall@10": "recall@10",
    }.items():
        assert ours[name] == pytest.approx(theirs[f"cosine_{key}"], abs=1e-6), name
    assert 0.05 < ours["ndcg@10"] < 0.95


def test_grades_count_and_each_query_keeps_its_own_score() -> None:
    data = RetrievalSet({"a": "x", "b": "y"}, dict.fromkeys("123", ""), {"a": {"1": 2, "2": 1}, "b": {"3": 1}}, "")
    result = score(data, [["2", "3", "1"], []])
    assert result.per_query["ndcg@10"][0] == pytest.approx((1 + 2 / np.log2(4)) / (2 + 1 / np.log2(3)))
    assert {name: values[1] for name, values in result.per_query.items()} == dict.fromkeys(METRICS, 0.0)
    assert result.metrics["mrr@10"] == 0.5
    assert result.per_query["recall@10"][0] == 1.0


def test_only_the_first_ten_places_count() -> None:
    data = RetrievalSet({"a": "x"}, {str(i): "" for i in range(12)}, {"a": {"11": 1}}, "")
    assert score(data, [[str(i) for i in range(12)]]).metrics["hit@10"] == 0.0


def test_of_more_relevant_documents_than_places_the_best_that_fit_are_the_ideal() -> None:
    grades = {str(i): 1 + i % 2 for i in range(24)}
    data = RetrievalSet({"a": "x"}, dict.fromkeys(grades, ""), {"a": grades}, "")
    best = sorted(grades, key=lambda name: -grades[name])
    assert score(data, [best]).metrics["ndcg@10"] == pytest.approx(1.0)
    assert score(data, [best[::-1]]).metrics["ndcg@10"] == pytest.approx(0.5)
    assert score(data, [best]).metrics["recall@10"] == pytest.approx(10 / 24)


def test_vectors_that_are_not_normalised_are_ranked_by_their_direction() -> None:
    queries, documents = np.array([[3.0, 0.0]], np.float32), np.array([[90.0, 90.0], [0.1, 0.01], [0.0, 0.0]], np.float32)
    assert rank(queries, documents, ["far", "near", "nothing"]) == [["near", "far", "nothing"]]


def test_what_two_rankings_put_alike_is_fused_in_the_order_of_the_ids() -> None:
    data = RetrievalSet({"a": "x"}, dict.fromkeys("12", ""), {"a": {"2": 1}}, "")
    assert fuse(data, score(data, [["2"]]), score(data, [["1"]])).ranked == (("1", "2"),)


def test_bm25_finds_shared_words_and_gives_no_rank_to_documents_without_any() -> None:
    documents = {"1": "read_csv parses a table", "2": "the moon", "3": "write a file"}
    data = RetrievalSet({"a": "csv table", "b": "zebra"}, documents, {"a": {"1": 1}, "b": {"2": 1}}, "")
    result = bm25_baseline(data)
    assert result.ranked[0] == ("1",)
    assert result.ranked[1] == ()
    assert result.metrics["ndcg@10"] == 0.5


def test_bm25_finds_a_word_inside_a_sentence_without_spaces() -> None:
    assert bm25_top(["机器学习"], ["今天天气很好", "什么是机器学习和深度学习"], depth=1) == [[1]]


def test_bm25_over_texts_without_words_finds_nothing() -> None:
    assert bm25_top(["a moon", "?"], ["???", "of the"], depth=5) == [[], []]


@pytest.mark.parametrize("side", ["both", "query"])
def test_a_comparison_tells_its_progress_to_the_last_text(tmp_path: Path, side: str) -> None:
    data = load_retrieval(write_beir(tmp_path / "beir", train=8, test=32))
    base = load_base(BaseSpec(str(tiny_encoder(tmp_path / "base", pooling="mean"))), task="embedding")
    model = attach(base, AdapterSection(r=2), task="embedding")
    told: list[tuple[int, int]] = []
    compare_towers(
        model, base.folder, EncodeSettings("mean", True, 16), data, side=side, batch_size=8, progress=lambda *counts: told.append(counts)
    )
    whole = 2 * len(data.queries) + (2 if side == "both" else 1) * len(data.documents)
    assert {of for _, of in told} == {whole}
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (whole, whole)


def test_a_comparison_holds_three_rows_and_the_interval_of_the_gain(tmp_path: Path) -> None:
    data = load_retrieval(write_beir(tmp_path / "beir", train=8, test=32))
    worst = score(data, [[] for _ in data.queries])
    best = score(data, [list(data.relevant[query]) for query in data.queries])
    bm25 = score(data, [["another", *data.relevant[query]] for query in data.queries])
    towers = Towers({"base": worst, "bm25": bm25, "adapter": best, "fused": fuse(data, bm25, best)}, {})
    made = comparison(towers, data, metric="mrr@10")
    assert made["gain_ci95"] == [1.0, 1.0]
    for pair, interval in made["intervals"].items():
        one, other = (towers.results[name].metrics["mrr@10"] for name in pair.split(" - "))
        assert interval[0] <= one - other <= interval[1]
    assert set(made["intervals"]) == {"adapter - base", "adapter - bm25", "base - bm25", "fused - bm25"}
    assert made["queries"] == 32
    assert made["base"]["mrr@10"] == 0.0
    assert made["adapter"]["ndcg@10"] == 1.0
    assert set(made["bm25"]) == set(METRICS)
