"""A run stopped and resumed gives bitwise the adapter of the unbroken run, whatever the method remembers between its steps."""

from pathlib import Path
from typing import Any

import pytest

from embedft.methods import METHODS
from tests.embedft.methods.cells import WHOLE, Cell, cell

QUANTIZED = {"qlora": "nf4", "llm_int8": "int8", "loftq": "nf4"}
# What remembers more than its parameters, and one of each way to be trained; with WHOLE every method.
REMEMBERING = ["qlora", "adalora", "relora", "delta_lora", "lora_plus", "lora_fa", "pissa", "prompt_tuning"]


IN_BF16 = METHODS if WHOLE else ("lora", "qlora", "llm_int8", "adalora")
LOW = [pytest.param(method, "bfloat16", marks=pytest.mark.bf16) for method in IN_BF16]


@pytest.mark.parametrize(("method", "dtype"), [*((method, "float32") for method in (METHODS if WHOLE else REMEMBERING)), *LOW])
def test_resume_is_exact(method: str, dtype: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("EMBEDFT_DTYPE", dtype)
    quantization = QUANTIZED.get(method, "none")

    def fresh() -> Cell:
        return cell(tmp_path, bases["causal_lm"], "causal_lm", method, quantization, checkpoint_every=3, max_steps=6)

    unbroken = fresh()
    unbroken.trainer.args.output_dir = str(tmp_path / "other")
    unbroken.trainer.train()
    stop_after(fresh().trainer, 3)
    again = fresh()
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert again.trainer.state.global_step == 6
    other = dict(again.model.named_parameters())
    for name, value in unbroken.model.named_parameters():
        assert torch.equal(value, other[name]), name
    assert torch.equal(unbroken.outputs(unbroken.model), again.outputs(again.model))


@pytest.mark.parametrize(("method", "options"), [("relora", {}), ("delta_lora", {"begin": 0.5})])
def test_the_best_weights_may_be_older_than_the_frozen_pair(
    method: str, options: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    from embedft.training.best import BestCheckpoint

    made, kept = cell(tmp_path, bases["causal_lm"], "causal_lm", method, "none", max_steps=6, options=options), {}
    scores = iter([0.9, 0.5, 0.4, 0.3, 0.2, 0.1])

    def worse_each_time() -> float:
        kept.setdefault("outputs", made.outputs(made.model))
        return next(scores)

    best = BestCheckpoint(made.trainer, tmp_path, worse_each_time, metric="ndcg@10", every=1, patience=None)
    made.trainer.train()
    assert "frozen" in made.model.peft_config
    assert not torch.allclose(made.outputs(made.model), kept["outputs"], atol=1e-3)
    assert best.restore(name="c")["step"] == 1
    assert "frozen" not in made.model.peft_config
    assert torch.allclose(made.outputs(made.model), kept["outputs"], atol=1e-6)
    assert {name for name, value in made.model.named_parameters() if value.requires_grad} == {
        name for name, _ in made.model.named_parameters() if ".lora_" in name
    }


def stop_after(trainer: object, step: int) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == step

    trainer.add_callback(Stop())  # type: ignore[attr-defined]
    trainer.train()  # type: ignore[attr-defined]
