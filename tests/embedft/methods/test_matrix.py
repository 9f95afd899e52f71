"""Every method on every kind of base: each cell passes, or is a refusal by name."""

from pathlib import Path
from typing import Any

import pytest

from embedft.errors import MethodUnsupported
from embedft.methods import METHODS, load_adapter, save_weights
from tests.embedft.methods.cells import WHOLE, cell, same, tensors_of

TASKS, QUANTIZATIONS = ("causal_lm", "embedding"), ("none", "int8", "nf4")
# (method, task or None for both, quantizations): what is refused, and a word of the reason that the user reads.
REFUSED = [
    ("qlora", None, {"none", "int8"}, "base.quantization=nf4"),
    ("llm_int8", None, {"none", "nf4"}, "base.quantization=int8"),
    ("pissa", None, {"int8", "nf4"}, "base.quantization=none"),
    ("olora", None, {"int8", "nf4"}, "base.quantization=none"),
    ("loftq", None, {"none"}, "base.quantization=nf4 or int8"),
    ("loha", None, {"nf4"}, "base.quantization=int8 or none"),
    ("lokr", None, {"nf4"}, "base.quantization=int8 or none"),
    ("full", None, {"int8", "nf4"}, "base.quantization=none"),
    ("prefix_tuning", "embedding", {"none", "int8", "nf4"}, "use prompt_tuning"),
    ("llama_adapter", "embedding", {"none", "int8", "nf4"}, "use prefix_tuning or lora"),
]


def chosen() -> list[Any]:
    """All refusals; of the rest each method on each task, on one of its quantizations in turn (all with WHOLE), and in bf16 on another."""
    cells: list[Any] = []
    for number, method in enumerate(METHODS):
        for turn, task in enumerate(TASKS):
            passing = [each for each in QUANTIZATIONS if not refusal(method, task, each)]
            kept, low = (passing, passing) if WHOLE else (_turn(passing, number + turn), _turn(passing, number + turn + 1))
            cells += [pytest.param(method, task, each, "float32") for each in QUANTIZATIONS if each in kept or each not in passing]
            cells += [pytest.param(method, task, each, "bfloat16", marks=pytest.mark.bf16) for each in low]
    return cells


def _turn(passing: list[str], number: int) -> list[str]:
    return [passing[number % len(passing)]] if passing else []


def refusal(method: str, task: str, quantization: str) -> str | None:
    return next((word for name, of, which, word in REFUSED if name == method and of in (None, task) and quantization in which), None)


def test_the_table_names_every_method() -> None:
    named = "lora qlora llm_int8 rslora dora pissa olora loftq eva lora_plus lora_fa vera adalora ia3 loha lokr prefix_tuning p_tuning"
    assert set(METHODS) == {*named.split(), "prompt_tuning", "multitask_prompt_tuning", "llama_adapter", "delta_lora", "relora", "full"}


@pytest.mark.parametrize(("method", "task", "quantization", "dtype"), chosen())
def test_a_cell(
    method: str, task: str, quantization: str, dtype: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("EMBEDFT_DTYPE", dtype)
    if word := refusal(method, task, quantization):
        with pytest.raises(MethodUnsupported, match=word):
            cell(tmp_path, bases[task], task, method, quantization)
        return
    made = cell(tmp_path, bases[task], task, method, quantization)
    row, model = METHODS[method], made.model
    started = made.outputs(model)
    assert same(started, made.before, 1e-4) or not row.neutral_start
    assert dtype == "bfloat16" or row.neutral_start or not same(started, made.before, 1e-4), "the table calls its start another one"
    loss = made.loss(model)
    trained = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    made.trainer.train()
    assert all(value.dtype == torch.float32 for value in trained.values())
    assert any(not torch.equal(value, trained[name]) for name, value in model.named_parameters() if name in trained)
    after = tensors_of(model)
    assert not made.held - after, "a tensor of the base changed"
    with model.disable_adapter():
        assert torch.equal(made.outputs(model), made.before)
    assert made.loss(model) < 0.97 * loss
    adapted = made.outputs(model)
    assert float((adapted - started).abs().max()) > 1e-3
    save_weights(model, tmp_path / "adapter", base_name="tiny")
    loaded = fresh(made, tmp_path / "adapter", task)
    assert same(made.outputs(loaded), adapted, 2e-5)
    if row.merges and quantization == "none":
        assert same(made.outputs(loaded.merge_and_unload()), adapted, 1e-4)


def fresh(made: Any, folder: Path, task: Any) -> Any:
    """The adapter's files on a base loaded from its own."""
    from embedft.base import load_model

    return load_adapter(load_model(made.base.folder, task=task), folder)
