"""What an adapted layer computes in: the adapter's float32 and the base's bf16 meet without copies that change no bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from embedft.base import DTYPE, BaseSpec, load_base
from embedft.methods import attach
from embedft.methods.companion import lora_layers
from embedft.recipe import AdapterSection
from tests.fixtures_lm import tiny_llama


class Widened(TorchDispatchMode):
    """Counts the copies that make bf16 float32."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and given[0].dtype is torch.bfloat16 and named.get("dtype") is torch.float32:
            self.count += 1
        return function(*given, **(named or {}))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(DTYPE, "bfloat16")
    return load_base(BaseSpec(str(tiny_llama(tmp_path / "tiny"))), task="causal_lm")


def trained(model: Any) -> tuple[list[torch.Tensor], int]:
    """Gradients of a step, which load_base's models take under autocast, and the copies that it took."""
    model.zero_grad()
    ids = torch.arange(2, 26).view(2, 12)
    with Widened() as widened:
        model(input_ids=ids, labels=ids).loss.backward()
    return [value.grad.clone() for value in model.parameters() if value.requires_grad], widened.count


def as_peft_has_it(model: Any) -> None:
    for module in model.modules():
        module.__dict__.pop("_cast_input_dtype", None)


@pytest.mark.parametrize(("method", "spared"), [("lora", True), ("dora", False), ("pissa", False)])
def test_under_autocast_a_lora_layer_takes_its_input_as_it_is_to_the_same_bits(base: Any, method: str, spared: bool) -> None:
    torch.manual_seed(0)
    model: Any = attach(base, AdapterSection(method=method, r=4), task="causal_lm")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    ours, copies = trained(model)
    as_peft_has_it(model)
    theirs, more = trained(model)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert (copies < more) if spared else (copies == more)


def test_without_autocast_an_adapted_layer_answers_all_the_same(base: Any) -> None:
    """As one does that is taken out of its model: load_base's models run under autocast."""
    model: Any = attach(base, AdapterSection(r=4), task="causal_lm")
    _, layer = next(lora_layers(model))
    assert layer(torch.ones(3, layer.in_features, dtype=torch.bfloat16)).dtype is torch.bfloat16
