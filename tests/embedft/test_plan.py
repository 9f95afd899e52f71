"""What a run is said to cost, against what the same run allocates."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedft.base import BaseSpec, load_base
from embedft.causal_lm.sizes import batch_for
from embedft.causal_lm.template import template_of
from embedft.causal_lm.train import build_trainer, read_split, tokenized
from embedft.cli import main
from embedft.footprint import tensor_bytes
from embedft.methods import attach
from embedft.plan import Plan, plan
from embedft.recipe import parse_recipe
from embedft.training.measure import TrackedMemory
from tests.families import tiny_decoder
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
    made = plan(recipe, batch_for(recipe))
    assert made.peak_bytes == pytest.approx(measured(recipe, tmp_path), rel=0.15)
    parts = made.memory
    assert sum(parts[name] for name in ("weights", "adapter", "optimizer", "gradients", "activations")) == parts["peak"]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_mixture_is_planned_as_large_as_it_is_whatever_its_dtype(tmp_path: Path, family: str, quantization: str) -> None:
    base = tiny_decoder(tmp_path / "base", family)
    recipe = recipe_of(tmp_path, base, quantization=quantization)
    made = plan(recipe, batch_for(recipe))
    loaded = load_base(BaseSpec(str(base), quantization), task="causal_lm")
    assert made.weights_bytes == pytest.approx(tensor_bytes(loaded.model), rel=0.05)
    assert made.peak_bytes == pytest.approx(measured(recipe, tmp_path), rel=0.15)


@pytest.mark.parametrize("given", [{"bnb_4bit_quant_type": "nf4"}, {"bnb_4bit_use_double_quant": True}], ids=str)
def test_a_base_that_others_quantized_is_planned_by_what_they_left_out_and_how_they_keep_scales(
    base: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    left = ["lm_head", "down_proj", "model.layers.1.self_attn"]
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=left, **given)
    shutil.copytree(base, tmp_path / "theirs", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(tmp_path / "theirs")
    recipe = recipe_of(tmp_path, tmp_path / "theirs")
    loaded = load_base(BaseSpec(str(tmp_path / "theirs")), task="causal_lm")
    assert plan(recipe, batch_for(recipe)).weights_bytes == pytest.approx(tensor_bytes(loaded.model), rel=0.02)


def test_it_counts_parameters_as_training_does(base: Path, tmp_path: Path) -> None:
    from embedft.training.measure import trainable

    recipe = recipe_of(tmp_path, base)
    made = plan(recipe, batch_for(recipe))
    loaded = load_base(BaseSpec(str(base)), task="causal_lm")
    assert made.parameters == sum(value.numel() for value in loaded.model.parameters())
    assert made.weights_bytes == pytest.approx(tensor_bytes(loaded.model), rel=0.01)
    size = trainable(attach(loaded, recipe.adapter, task="causal_lm"))
    assert (made.trainable, made.trainable_percent) == (size.count, pytest.approx(size.percent))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_an_optimizers_moments_are_planned_as_large_as_they_are(base: Path, tmp_path: Path, optimizer: str) -> None:
    recipe = recipe_of(tmp_path, base, optimizer=optimizer, max_steps=1)
    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"r": 64})})
    loaded = load_base(BaseSpec(str(base)), task="causal_lm")
    examples = tokenized(read_split(recipe).train, template_of(loaded.tokenizer), recipe)
    model = attach(loaded, recipe.adapter, task="causal_lm")
    trainer = build_trainer(model, loaded, examples, recipe.train, folder=tmp_path / "run")
    trainer.train()
    states = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state.values()
    moments = [value for state in states for name, value in state.items() if name in {"exp_avg", "exp_avg_sq", "state1", "state2"}]
    assert plan(recipe, batch_for(recipe)).optimizer_bytes == sum(moment.nbytes for moment in moments)


def test_a_run_takes_its_steps_and_a_step_all_the_batches_that_it_accumulates(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedft.plan._speed", lambda _: (1e9, 1e9, 0.0))
    one, four = (plan(recipe, batch_for(recipe)) for recipe in (recipe_of(tmp_path, base, accumulate=n) for n in (1, 4)))
    assert four.seconds_per_step == pytest.approx(4 * one.seconds_per_step)
    assert (one.steps, one.seconds) == (3, pytest.approx(3 * one.seconds_per_step))


def test_what_does_not_fit_is_advised_what_helps(base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, base)
    made = plan(recipe, batch_for(recipe))
    cheaper = made.peak_with_checkpointing
    assert cheaper is not None
    assert cheaper < made.peak_bytes
    assert replace(made, available_bytes=made.peak_bytes).fits
    for free, helps in ((made.peak_bytes - 1, True), (cheaper + 1, True), (cheaper, False)):
        tight = replace(made, available_bytes=free)
        assert not tight.fits
        assert ("gradient_checkpointing" in tight.advice) == helps
        assert ("halve train.batch" in tight.advice) != helps


def test_a_quantized_base_is_planned_as_large_as_it_is(base: Path, tmp_path: Path) -> None:
    for scheme in ("nf4", "int8"):
        recipe = recipe_of(tmp_path, base, quantization=scheme)
        loaded = load_base(BaseSpec(str(base), scheme), task="causal_lm")  # type: ignore[arg-type]
        assert plan(recipe, batch_for(recipe)).weights_bytes == pytest.approx(tensor_bytes(loaded.model), rel=0.05)


def test_the_command_plans_both_kinds_without_data_or_weights(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: dict[str, Plan] = {}
    for name in ("pydocs-code", "pydocs-package"):
        assert main(["plan", name, "--json", "train.batch=4", "train.max_length=32", "base.quantization=none"]) == 0
        made[name] = Plan(**json.loads(capsys.readouterr().out))
        assert made[name].peak_bytes > made[name].weights_bytes > 0
        assert made[name].seconds_per_step > 0
    assert made["pydocs-code"].peak_with_checkpointing is None
    assert made["pydocs-package"].peak_with_checkpointing
