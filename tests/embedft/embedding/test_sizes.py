"""What `plan` says of an embedding run, against what the same run allocates, packed and padded."""

from pathlib import Path
from typing import Any

import pytest

from embedft.base import BaseSpec, load_base
from embedft.embedding.data import load_data
from embedft.embedding.losses import loss_named
from embedft.embedding.sizes import batch_for
from embedft.embedding.train import make_trainer, plan_for, settings_for
from embedft.errors import EmbedftError
from embedft.footprint import tensor_bytes
from embedft.methods import attach
from embedft.plan import plan
from embedft.training.measure import TrackedMemory
from tests.embedft.embedding.runs import Make
from tests.fixtures_embedding import planted_rows, write_rows


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quantization": "nf4"},
        {"quantization": "int8"},
        {"adapter": {"side": "query"}},
        {"adapter": {"layers": 1}},
        {"adapter": {"dropout": 0.1}},
        {"adapter": {"side": "query"}, "train": {"max_steps": 16, "batch": 4}},
        {"adapter": {"layers": 1}, "train": {"max_steps": 16, "batch": 4}},
        {"loss": {"name": "gist"}, "train": {"max_steps": 16, "batch": 4}},
    ],
    ids=str,
)
def test_the_peak_is_within_15_percent_of_what_training_allocates(make: Make, tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = make(**{**settings, "train": {"max_steps": 2, "batch": 64, "lr": 1e-3, **settings.get("train", {})}})
    made = plan(recipe, batch_for(recipe))
    base = load_base(BaseSpec(recipe.base.model, recipe.base.quantization), task="embedding")
    examples, _ = load_data(recipe.data, recipe.eval, scored=False)
    model = attach(base, recipe.adapter, task="embedding")
    batches = plan_for(examples, recipe, loss=loss_named(recipe.loss.name), model=model)
    held = tensor_bytes(model)
    with TrackedMemory() as memory:
        make_trainer(model, base, settings_for(recipe, base), examples, recipe, plan=batches, output=tmp_path).train()
    assert made.peak_bytes == pytest.approx(held + memory.bytes, rel=0.15)


def test_what_training_refuses_is_refused_by_the_plan(make: Make, tmp_path: Path) -> None:
    same = write_rows(tmp_path / "same.jsonl", [{"query": f"q{i}", "document": "the one answer"} for i in range(8)])
    judged = write_rows(tmp_path / "judged.jsonl", planted_rows(8))
    for sections, told in (
        ({"data": {"train": same, "eval": judged}}, "no two training rows may share a batch"),
        ({"loss": {"name": "triplet"}}, "expected a negative in every row"),
        ({"loss": {"dimensions": [64]}}, r"loss\.dimensions: 64; expected less than the 64"),
        ({"train": {"patience": 2}}, r"go with train\.evaluate_every"),
    ):
        recipe = make(**sections)
        with pytest.raises(EmbedftError, match=told):
            plan(recipe, batch_for(recipe))


def test_without_the_data_no_number_of_steps_is_told(make: Make, tmp_path: Path) -> None:
    absent = {"train": str(tmp_path / "absent.jsonl"), "eval": None}
    recipes = make(data=absent), make(data=absent, train={"max_steps": 3})
    unknown, known = (plan(recipe, batch_for(recipe)) for recipe in recipes)
    assert (unknown.steps, unknown.seconds) == (None, None)
    assert unknown.seconds_per_step > 0
    assert (known.steps, known.seconds) == (3, pytest.approx(3 * known.seconds_per_step))
