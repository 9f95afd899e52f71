"""AdaLoRA: its ranks reach their budget, and its penalty counts as its paper says."""

from pathlib import Path
from typing import Any

import pytest

from embedft.methods.companion import lora_layers
from tests.embedft.causal_lm.test_settings import keep_gradients
from tests.embedft.methods.cells import cell, trained


def test_adalora_reaches_its_budget_with_ranks_that_differ(llama: Path, tmp_path: Path) -> None:
    made = cell(tmp_path, llama, "causal_lm", "adalora", "none", max_steps=16)
    layers = len(list(lora_layers(made.model)))
    model = trained(made)
    ranks = {name: sum(kept) for name, kept in model.peft_config["default"].rank_pattern.items()}
    assert sum(ranks.values()) == 4 * layers
    assert len(set(ranks.values())) > 1
    effective = sum(int((layer.lora_E["default"] != 0).sum()) for _, layer in lora_layers(model))
    assert effective <= 4 * layers < 6 * layers


@pytest.mark.parametrize("task", ["causal_lm", "embedding"])
def test_adaloras_penalty_counts_once_a_step_in_either_task(bases: dict[str, Path], tmp_path: Path, task: str) -> None:
    def penalty(accumulate: int) -> float:
        norms: list[Any] = []
        for weight in (0.0, 0.5):
            settings = {"max_steps": 1, "lr": 1e-12, "max_grad_norm": 1e9, "batch": 6, "accumulate": accumulate}
            folder = tmp_path / f"{accumulate}-{weight}"
            folder.mkdir()
            made = cell(folder, bases[task], task, "adalora", "none", options={"orthogonal": weight}, **settings)
            gradients: dict[str, Any] = {}
            keep_gradients(made.trainer, gradients)
            made.trainer.train()
            norms.append(gradients)
        return sum(float((norms[1][name] - norms[0][name]).norm()) for name in norms[0] if "lora_A" in name)

    once = penalty(1)
    assert once > 0
    assert penalty(4) == pytest.approx(once, rel=0.05)


def test_adaloras_penalty_is_no_part_of_an_evaluations_loss(llama: Path, tmp_path: Path) -> None:
    made = cell(tmp_path, llama, "causal_lm", "adalora", "none", options={"orthogonal": 50.0}, max_steps=1, lr=1e-12)
    assert made.loss(trained(made)) < 20


@pytest.mark.parametrize("settle", [0.0, 0.9])
def test_adalora_reaches_its_budget_however_early_its_ranks_settle(llama: Path, tmp_path: Path, settle: float) -> None:
    made = cell(tmp_path, llama, "causal_lm", "adalora", "none", options={"settle": settle, "warm": 0.0})
    model = trained(made)
    pattern: Any = model.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == 4 * len(pattern)
