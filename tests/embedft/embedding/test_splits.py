"""Which rows train, which choose the best step and which judge: of files, BEIR folders and hub datasets."""

from pathlib import Path

import pytest

from embedft.embedding.data import (
    RetrievalSet,
    load_data,
    load_retrieval,
    make_examples,
    of_pairs,
    reduce_to,
    split_dev,
)
from embedft.embedding.pairs import Example
from embedft.errors import DataError
from embedft.recipe import EmbeddingData, EmbeddingEval
from tests.embedft.embedding.reading import ROWS, load, problems
from tests.fixtures_embedding import write_beir, write_rows

JUDGED = of_pairs([Example("what nobody trains on", "its answer")], extra_documents=())


def test_a_beir_folder_trains_on_train_and_is_scored_on_test(tmp_path: Path) -> None:
    examples, retrieval = load(write_beir(tmp_path / "beir", train=32, test=8))
    assert len(examples) == 32
    assert len(retrieval.queries) == 8
    assert len(retrieval.documents) == 16
    assert set(retrieval.queries.values()).isdisjoint(row.query for row in examples.rows)


def test_a_training_row_whose_query_is_evaluated_is_left_out(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    evaluation = write_rows(tmp_path / "test.jsonl", ROWS[:5])
    examples, retrieval = load(train, eval=evaluation)
    assert len(examples) == 35
    assert len(retrieval.queries) == 5
    capped, retrieval = load(train, eval=evaluation, queries=2)
    assert len(retrieval.queries) == 2
    assert capped == examples, "a later evaluation asks all of them"


def test_caps_keep_relevant_documents_and_do_not_depend_on_order(tmp_path: Path) -> None:
    retrieval = load_retrieval(write_beir(tmp_path / "beir", train=8, test=32))
    small = reduce_to(retrieval, queries=6, documents=4)
    needed = {identifier for grades in small.relevant.values() for identifier in grades}
    assert len(small.queries) == 6
    assert needed <= set(small.documents)
    assert len(small.documents) == max(4, len(needed))
    turned = RetrievalSet(dict(reversed(retrieval.queries.items())), dict(reversed(retrieval.documents.items())), retrieval.relevant, "")
    assert reduce_to(turned, queries=6, documents=4).queries == small.queries


def test_the_same_queries_are_held_out_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    one, other = (load(write_rows(tmp_path / f"{i}.jsonl", rows)) for i, rows in enumerate((ROWS, ROWS[::-1])))
    assert set(one[1].queries.values()) == set(other[1].queries.values())
    assert set(one[0].rows) == set(other[0].rows)
    assert set(one[1].documents.values()) == {row["document"] for row in ROWS}, "what is trained on stands in the corpus too"


@pytest.mark.parametrize("given", [False, True])
def test_training_never_sees_the_queries_that_choose_the_best_checkpoint(tmp_path: Path, given: bool) -> None:
    examples = make_examples(Example(row["query"], row["document"]) for row in ROWS)
    dev = write_rows(tmp_path / "dev.jsonl", ROWS[:7]) if given else None
    kept, retrieval = split_dev(examples, JUDGED, dev)
    asked = set(retrieval.queries.values())
    assert len(asked) == (7 if given else 4)
    assert {row.query for row in kept.rows} == {row["query"] for row in ROWS} - asked
    with pytest.raises(DataError, match=r"data\.dev: 1 training rows besides the dev queries; expected at least 2"):
        split_dev(make_examples(examples.rows[:8]), JUDGED, write_rows(tmp_path / "dev.jsonl", ROWS[:7]))


def test_the_dev_queries_of_a_folder_that_is_evaluated_too_are_its_dev_splits(tmp_path: Path) -> None:
    folder = Path(write_beir(tmp_path / "beir", train=32, test=8))
    lines = (folder / "qrels" / "train.tsv").read_text().splitlines(keepends=True)
    (folder / "qrels" / "train.tsv").write_text("".join(lines[:25]))
    (folder / "qrels" / "dev.tsv").write_text("".join([lines[0], *lines[25:]]))
    examples, judged = load(str(folder))
    _, dev = split_dev(examples, judged, str(folder))
    assert (len(dev.queries), len(judged.queries)) == (8, 8)
    assert judged.asked.isdisjoint(dev.queries.values())


def test_no_query_that_an_adapter_is_judged_by_chooses_its_best_step_be_it_capped_or_not(tmp_path: Path) -> None:
    judged = write_rows(tmp_path / "judged.jsonl", ROWS[:8])
    examples, retrieval = load(write_rows(tmp_path / "train.jsonl", ROWS[12:]), eval=judged, queries=3)
    kept, dev = split_dev(examples, retrieval, write_rows(tmp_path / "dev.jsonl", ROWS[4:14]))
    assert set(dev.queries.values()) == {row["query"] for row in ROWS[8:14]}
    assert kept.left_out == (
        "4 of 10 dev queries choose no step: the evaluation asks them",
        "2 of 28 training rows are not used: data.dev asks their queries",
    )
    with pytest.raises(DataError, match=r"data\.dev: the evaluation asks all of its 8 queries"):
        split_dev(examples, retrieval, judged)


def test_training_rows_that_the_evaluation_asks_are_left_out_and_counted(tmp_path: Path) -> None:
    evaluation = write_rows(tmp_path / "test.jsonl", ROWS[:5])
    assert load(write_rows(tmp_path / "a.jsonl", ROWS), eval=evaluation)[0].left_out == (
        "5 of 40 training rows are not used: the evaluation asks their queries",
    )
    assert load(write_rows(tmp_path / "b.jsonl", ROWS[5:]), eval=evaluation)[0].left_out == ()


def test_a_folder_without_a_split_to_be_judged_by_is_told_where_to_name_one(tmp_path: Path) -> None:
    folder = Path(write_beir(tmp_path / "beir", train=32, test=8))
    (folder / "qrels" / "test.tsv").unlink()
    (found,) = problems(str(folder))
    assert found == "beir/qrels: neither test.tsv nor dev.tsv to be judged by; expected one, or data.eval"
    assert len(load(str(folder), eval=write_rows(tmp_path / "test.jsonl", ROWS[:3]))[1].queries) == 3


def test_what_is_held_out_is_told(tmp_path: Path) -> None:
    examples, judged = load(write_rows(tmp_path / "a.jsonl", ROWS))
    assert examples.left_out == ("without data.eval it is judged by 4 of the training queries, which are held out",)
    kept, _ = split_dev(examples, judged, None)
    assert kept.left_out[1:] == ("without data.dev its best step is chosen by 4 of the training queries, which are held out",)


def test_one_row_beside_the_evaluations_is_too_few_to_learn_from(tmp_path: Path) -> None:
    train, evaluation = write_rows(tmp_path / "a.jsonl", ROWS[:3]), write_rows(tmp_path / "b.jsonl", ROWS[:2])
    assert "1 usable rows besides the evaluation's queries; expected at least 2" in problems(train, eval=evaluation)[0]
    assert len(load(train, eval=write_rows(tmp_path / "b.jsonl", ROWS[:1]))[0]) == 2


def test_of_a_beir_folder_the_first_pairs_are_trained_on_and_test_goes_before_dev(tmp_path: Path) -> None:
    folder = Path(write_beir(tmp_path / "beir", train=32, test=8))
    train = (folder / "qrels" / "train.tsv").read_text().splitlines(keepends=True)
    (folder / "qrels" / "dev.tsv").write_text("".join(train[:3]))
    data = EmbeddingData(train=str(folder), limit=5)
    examples, retrieval = load_data(data, EmbeddingEval(), scored=False)
    assert (len(examples), len(retrieval.queries)) == (5, 8)
    (folder / "qrels" / "test.tsv").unlink()
    assert len(load_retrieval(str(folder)).queries) == 2


def test_negatives_of_the_evaluations_pairs_are_documents_to_be_told_apart(tmp_path: Path) -> None:
    retrieval = load_retrieval(write_rows(tmp_path / "a.jsonl", [{"query": "q", "document": "d", "negatives": ["m", "n"]}]))
    assert set(retrieval.documents.values()) == {"d", "m", "n"}
    assert sum(map(len, retrieval.relevant.values())) == 1


def test_of_a_hub_dataset_the_validation_split_chooses_and_the_test_split_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    of = {"test": ROWS[:4], "validation": ROWS[4:9]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, *, split, revision: of[split])
    judged = load_retrieval("hf://owner/set")
    _, dev = split_dev(make_examples(Example(row["query"], row["document"]) for row in ROWS[9:]), judged, "hf://owner/set")
    assert [sorted(found.queries.values()) for found in (judged, dev)] == [sorted(row["query"] for row in rows) for rows in of.values()]
