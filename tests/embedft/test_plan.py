"""What a run is said to cost, against what the same run allocates."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedft.base import BaseSpec, load_base
from embedft.causal_lm.sizes import largest_batch
from embedft.causal_lm.template import template_of
from embedft.causal_lm.train import build_trainer, read_split, tokenized
from embedft.cli import main
from embedft.footprint import tensor_bytes
from embedft.methods import attach
from embedft.plan import Plan, plan
from embedft.recipe import parse_recipe
from embedft.training.measure import TrackedMemory
from tests.fixtures_lm import planted_rows, tiny_llama, write_jsonl


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("plan") / "base")


def recipe_of(folder: Path, base: Path, *, quantization: str = "none", method: str = "lora", **train: Any) -> Any:
    content = {
        "task": "causal_lm",
        "name": "p",
        "base": {"model": str(base), "quantization": quantization},
        "adapter": {"method": method},
        "data": {"train": str(write_jsonl(folder / "rows.jsonl", planted_rows(96)))},
        "train": {"batch": 32, "max_length": 96, "max_steps": 3} | train,
    }
    return parse_recipe(content)


def measured(recipe: Any, folder: Path) -> int:
    """Bytes that the base's and the adapter's tensors take, and the most that three steps allocate beside them."""
    loaded = load_base(BaseSpec(recipe.base.model, recipe.base.quantization), task="causal_lm")
    examples = tokenized(read_split(recipe).train, template_of(loaded.tokenizer), recipe)
    model = attach(loaded, recipe.adapter, task="causal_lm")
    trainer = build_trainer(model, loaded, examples, recipe.train, folder=folder / "run")
    held = tensor_bytes(model)
    with TrackedMemory() as memory:
        trainer.train()
    return held + memory.bytes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"quantization": "nf4"},
        {"quantization": "int8"},
        {"packing": True, "batch": 8},
        {"method": "full"},
        {"method": "prompt_tuning"},
    ],
    ids=str,
)
def test_the_peak_is_within_15_percent_of_what_training_allocates(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = recipe_of(tmp_path, base, **settings)
    made = plan(recipe, largest_batch(recipe))
    assert made.peak_bytes == pytest.approx(measured(recipe, tmp_path), rel=0.15)
    parts = made.memory
    assert sum(parts[name] for name in ("weights", "adapter", "optimizer", "gradients", "activations")) == parts["peak"]


def test_it_counts_parameters_as_training_does(base: Path, tmp_path: Path) -> None:
    from embedft.training.measure import trainable

    recipe = recipe_of(tmp_path, base)
    made = plan(recipe, largest_batch(recipe))
    loaded = load_base(BaseSpec(str(base)), task="causal_lm")
    assert made.parameters == sum(value.numel() for value in loaded.model.parameters())
    assert made.weights_bytes == pytest.approx(tensor_bytes(loaded.model), rel=0.01)
    size = trainable(attach(loaded, recipe.adapter, task="causal_lm"))
    assert (made.trainable, made.trainable_percent) == (size.count, pytest.approx(size.percent))


def test_a_quantized_base_is_planned_as_large_as_it_is(base: Path, tmp_path: Path) -> None:
    for scheme in ("nf4", "int8"):
        recipe = recipe_of(tmp_path, base, quantization=scheme)
        loaded = load_base(BaseSpec(str(base), scheme), task="causal_lm")  # type: ignore[arg-type]
        assert plan(recipe, largest_batch(recipe)).weights_bytes == pytest.approx(tensor_bytes(loaded.model), rel=0.05)


def test_the_command_plans_both_kinds_without_data_or_weights(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: dict[str, Plan] = {}
    for name in ("pydocs-code", "pydocs-package"):
        assert main(["plan", name, "--json", "train.batch=4", "train.max_length=32", "base.quantization=none"]) == 0
        made[name] = Plan(**json.loads(capsys.readouterr().out))
        assert made[name].peak_bytes > made[name].weights_bytes > 0
        assert made[name].seconds_per_step > 0
    assert made["pydocs-code"].peak_with_checkpointing is None
    assert made["pydocs-package"].peak_with_checkpointing
