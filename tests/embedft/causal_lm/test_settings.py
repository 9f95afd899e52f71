"""What a recipe's train section asks for is what the run does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec, load_base
from embedft.causal_lm.sizes import largest_batch
from embedft.causal_lm.template import template_of
from embedft.causal_lm.train import build_trainer, read_split, tokenized, train
from embedft.methods import attach
from embedft.recipe import CausalLMRecipe, parse_recipe
from tests.fixtures_lm import planted_recipe, write_jsonl

STEPS = 10


def trainer_of(tiny_base: Path, folder: Path, *, rows: int | None = None, **settings: Any) -> Any:
    import torch

    recipe = planted_recipe(folder, tiny_base, test_rows=0, train={"max_steps": STEPS, "batch": 4, "lr": 0.01} | settings)
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    examples = tokenized(read_split(recipe).train, template_of(base.tokenizer), recipe)[:rows]
    torch.manual_seed(0)
    return build_trainer(attach(base, recipe.adapter, task="causal_lm"), base, examples, recipe.train, folder=folder / "run")


def rates(trainer: Any) -> list[float]:
    from transformers import TrainerCallback

    seen: list[float] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

    trainer.add_callback(Look())
    trainer.train()
    return seen


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_warms_up_and_then_follows_its_schedule(tiny_base: Path, tmp_path: Path, schedule: str) -> None:
    import math

    made = rates(trainer_of(tiny_base, tmp_path, schedule=schedule, warmup=0.2))
    shapes = {
        "linear": lambda done: 1 - done,
        "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        "constant": lambda done: 1.0,
    }
    expected = [0.01 * step / 2 if step < 2 else 0.01 * shapes[schedule]((step - 2) / (STEPS - 2)) for step in range(STEPS)]
    assert made == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "kind", "state_bytes"),
    [("adamw", "AdamW", 4), ("adamw_8bit", "AdamW", 1), ("paged_adamw", "AdamW", 4), ("paged_adamw_8bit", "AdamW", 1)],
)
def test_the_optimizer_is_the_one_named_and_learns(tiny_base: Path, tmp_path: Path, optimizer: str, kind: str, state_bytes: int) -> None:
    trainer = trainer_of(tiny_base, tmp_path, optimizer=optimizer, schedule="constant", warmup=0.0)
    trainer.train()
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(inner).__name__.startswith(kind)
    assert ("bitsandbytes" in type(inner).__module__) == (optimizer != "adamw")
    large = [state for value, state in inner.state.items() if value.numel() >= 4096]
    moments = [state.get("exp_avg", state.get("state1")) for state in large]
    assert moments
    assert {moment.element_size() for moment in moments} == {state_bytes}
    assert bool(getattr(inner, "is_paged", False)) == optimizer.startswith("paged")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_accumulated_batches_are_one_large_batch(tiny_base: Path, tmp_path: Path) -> None:
    """Twelve rows of unequal length: the loss is a mean over tokens, not over batches' means."""
    import torch

    made: list[dict[str, Any]] = []
    for batch, accumulate in ((12, 1), (3, 4)):
        trainer = trainer_of(tiny_base, tmp_path, rows=12, batch=batch, accumulate=accumulate, max_steps=1, schedule="constant", warmup=0.0)
        gradients: dict[str, Any] = {}
        keep_gradients(trainer, gradients)
        trainer.train()
        made.append(gradients)
    assert any(value.abs().max() > 0 for value in made[0].values())
    for name, value in made[0].items():
        assert torch.allclose(value, made[1][name], rtol=1e-3, atol=1e-6), name


def keep_gradients(trainer: Any, into: dict[str, Any]) -> None:
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            into.update({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})

    trainer.add_callback(Keep())


def test_tensorboard_gets_the_losses_and_keeps_them(tiny_base: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = planted_recipe(tmp_path, tiny_base, test_rows=0, train={"max_steps": 10, "trackers": ["tensorboard"]})
    train(recipe, store=AdapterStore(tmp_path / "store"), progress=False)
    events = EventAccumulator(str(tmp_path / "store" / "runs" / recipe.name))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) == 2
    assert losses[1] < losses[0]


@pytest.fixture(scope="module")
def short_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with 40 positions."""
    folder = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("short") / "short"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    return folder


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("asked", [100_000, None])
def test_no_row_is_longer_than_the_base_has_positions(
    short_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    packing: bool,
    asked: int | None,
) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaModel

    from embedft.causal_lm import train as training

    widths, lengths = set[int](), set[int]()
    forward, evaluate = LlamaModel.forward, training.evaluate_generation

    def watched(self: Any, input_ids: Any = None, **given: Any) -> Any:
        widths.update([int(given["position_ids"].max()) + 1] if torch.is_grad_enabled() else [])
        return forward(self, input_ids, **given)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    monkeypatch.setattr(training, "evaluate_generation", lambda *given, **how: lengths.add(how["max_length"]) or evaluate(*given, **how))
    recipe = planted_recipe(tmp_path, short_base, test_rows=4, train={"max_steps": 2, "packing": packing, "max_length": asked or 1})
    if asked is None:
        given = recipe.model_dump(mode="json")
        del given["train"]["max_length"]
        recipe = parse_recipe(given)
    assert isinstance(recipe, CausalLMRecipe)
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "red", "completion": "stop " * 200}] * 24)
    store = AdapterStore(tmp_path / "store")
    train(recipe, store=store, progress=False)
    assert (widths, lengths) == ({40}, {40})
    assert store.passport(recipe.name).max_length == 40
    said = f"note: {recipe.name}: the base has 40 positions; train.max_length=100000 is cut\n"
    assert (said in capsys.readouterr().err) == (asked is not None)
    planned = (40 * recipe.train.batch if packing else 40,)
    assert largest_batch(recipe).lengths == planned
    (tmp_path / "train.jsonl").unlink()
    assert largest_batch(recipe).lengths == planned
    assert (said in capsys.readouterr().err) == (asked is not None)
