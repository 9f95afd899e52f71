"""What may share a batch, and what batches cost."""

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from embedft.embedding.batches import BatchPlan
from embedft.embedding.data import make_examples
from embedft.embedding.pairs import Example
from tests.embedft.embedding.runs import Make
from tests.fixtures_embedding import planted_rows, write_rows


def plan_of(rows: list[Example], **options: int) -> tuple[BatchPlan, list[Example]]:
    examples = make_examples(rows)
    return BatchPlan(examples, **({"batch": 8, "seed": 7} | options)), list(examples.rows)


def test_no_query_meets_another_of_its_own_answers_in_a_batch() -> None:
    rows = [Example(f"q{i % 20}", f"d{i}", (f"d{(i + 7) % 100}",)) for i in range(100)]
    plan, kept = plan_of(rows)
    relevant: dict[str, set[str]] = {}
    for row in kept:
        relevant.setdefault(row.query, set()).add(row.document)
    for batch in plan:
        for i in batch:
            others = {text for j in batch if j != i for text in (kept[j].document, *kept[j].negatives)}
            assert relevant[kept[i].query].isdisjoint(others), "an answer would be pushed away"


def test_a_document_shared_by_two_queries_never_stands_twice_in_a_batch() -> None:
    plan, kept = plan_of([Example(f"q{i}", f"d{i % 12}") for i in range(96)])
    for batch in plan:
        assert len({kept[i].document for i in batch}) == len(batch)


def test_many_queries_of_few_documents_are_planned_in_no_time() -> None:
    count = 20_000
    rows = [Example(f"q{i}", f"d{i % 10}") for i in range(count)]
    began = time.process_time()
    plan, kept = plan_of(rows, batch=64)
    batches = list(plan)
    assert time.process_time() - began < 2  # it was more than 4, and grew with the square
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert all(len({kept[i].document for i in batch}) == len(batch) for batch in batches)


def test_every_row_is_seen_once_an_epoch_and_in_another_order_the_next() -> None:
    plan, _kept = plan_of([Example(f"q{i}", f"d{i}") for i in range(50)])
    first = list(plan)
    assert sorted(i for batch in first for i in batch) == list(range(50))
    plan.set_epoch(1)
    second = list(plan)
    assert sorted(i for batch in second for i in batch) == list(range(50))
    assert second != first
    plan.set_epoch(0)
    assert list(plan) == first
    assert len(plan) == len(first)
    assert list(plan_of([Example(f"q{i}", f"d{i}") for i in range(50)], seed=8)[0]) != first


def test_rows_of_like_length_share_a_batch() -> None:
    lengths = random.Random(1).sample(range(1, 400), 256)
    plan, kept = plan_of([Example(f"q{i}", "x" * length + f" {i}") for i, length in enumerate(lengths)], batch=16)
    padded = sum(max(len(kept[i].document) for i in batch) * len(batch) for batch in plan)
    assert padded < 1.15 * sum(len(row.document) for row in kept)


def test_a_batch_of_one_is_left_out_and_more_rows_than_there_are_is_one_batch() -> None:
    plan, _ = plan_of([Example(f"q{i}", "the same") for i in range(5)])
    assert list(plan) == []
    plan, _ = plan_of([Example(f"q{i}", f"d{i}") for i in range(5)], batch=64)
    assert [len(batch) for batch in plan] == [5]


def test_every_epoch_has_as_many_batches_as_the_first_however_badly_its_order_fits() -> None:
    """Two rows with one answer fit into two batches or into three, as their order goes."""
    rows = [Example("q1", "a"), Example("q2", "a"), Example("q3", "b"), Example("q4", "c")]
    lengths = {
        seed: [len(plan.of_epoch(epoch)) for epoch in range(50)] for seed in range(6) for plan in [plan_of(rows, batch=2, seed=seed)[0]]
    }
    assert lengths == {seed: [len(plan_of(rows, batch=2, seed=seed)[0])] * 50 for seed in range(6)}
    assert {counts[0] for counts in lengths.values()} == {1, 2}, "the orders do differ"


def test_losses_of_scored_pairs_may_compare_a_querys_documents() -> None:
    examples = make_examples([Example("q", f"d{i}", score=float(i)) for i in range(8)])
    assert [len(batch) for batch in BatchPlan(examples, batch=8, seed=7, exclusive=False)] == [8]


def test_a_weight_says_how_often_a_row_is_shown_and_a_half_is_another_every_epoch() -> None:
    rows = [Example(f"q{i}", f"d{i}", weight=weight) for i, weight in enumerate([2.0] * 20 + [1.0] * 20 + [0.5] * 20)]
    plan, _ = plan_of(rows, batch=2)
    epochs = [Counter(i for batch in plan.of_epoch(epoch) for i in batch) for epoch in range(2)]
    for shown in epochs:
        assert {shown[i] for i in range(20)} == {2}
        assert {shown[i] for i in range(20, 40)} == {1}
        assert sum(shown[i] for i in range(40, 60)) == 10
    assert sum(epochs, Counter()) == {i: 2 * row.weight for i, row in enumerate(rows)}, "two epochs of a half show every row"
    assert {i for i in range(40, 60) if epochs[0][i]} != set(range(40, 50)), "a half of a sorted file is no half of its kinds"
    assert all(len(set(batch)) == len(batch) for batch in plan), "a row never meets itself"


def test_rows_that_share_no_batch_and_weights_that_show_no_row_are_counted() -> None:
    crowd = [Example(f"q{i}", "the same") for i in range(50)]
    plan, _ = plan_of([*crowd, *(Example(f"p{i}", f"d{i}") for i in range(20))])
    assert plan.alone == plan.shown - sum(map(len, plan)) > 20
    assert plan_of([Example(f"p{i}", f"d{i}") for i in range(16)])[0].alone == 0
    assert plan.never == []
    light = [Example(f"w{i}", f"v{i}", weight=0.04) for i in range(10)]
    assert plan_of([*crowd[:1], *light, Example("p", "d", weight=0.5), Example("r", "e", weight=0.51)])[0].never == [0.04, 0.5]


def test_what_is_planned_is_what_the_trainer_will_show(make: Make, root: Path) -> None:
    """Held-out queries, unused negatives and the base's own limit are not counted."""
    from embedft.base import BaseSpec, load_base
    from embedft.embedding.data import load_data, split_dev
    from embedft.embedding.losses import LOSSES
    from embedft.embedding.sizes import largest_batch
    from embedft.embedding.train import plan_for
    from embedft.methods import attach

    rows: list[dict[str, Any]] = [row | {"negatives": [f"no {i}", f"none {i}"]} for i, row in enumerate(planted_rows(160))]
    data = {"train": write_rows(root / "planned.jsonl", rows)}
    for loss in ("gist", "mnrl"):
        recipe = make(data=data, loss={"name": loss}, adapter={"dropout": 0.1}, train={"evaluate_every": 5, "epochs": 2, "max_length": 500})
        examples, _ = split_dev(*load_data(recipe.data, recipe.eval, scored=False), None)
        model = attach(load_base(BaseSpec(recipe.base.model), task="embedding"), recipe.adapter, task="embedding")
        batches = list(plan_for(examples, recipe, loss=LOSSES[loss], model=model))
        planned = largest_batch(recipe)
        assert planned.steps == 2 * len(batches)
        assert len(planned.lengths) == 2 + (1 if loss == "gist" else 2)
        assert max(planned.lengths) <= 32
