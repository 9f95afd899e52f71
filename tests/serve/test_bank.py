"""Adapters on the peft engine's base: what comes, goes, and is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from embedft.base import BaseSpec, load_base
from embedft.errors import AdapterExists, AdapterInvalid, AdapterNotFound
from serve.engines.peft.bank import AdapterBank
from serve.engines.vllm_server import match_modules
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import FEATURES, featured_adapter, plain_peft, random_adapter


def test_an_adapters_modules_are_matched_or_refused() -> None:
    known = {"model.layers.0.q_proj", "model.layers.0.k_proj", "lm_head"}
    assert set(match_modules({"layers.0.q_proj": 1, "model.layers.0.k_proj": 2}, known)) == known - {"lm_head"}
    for wrong in ({"blocks.0.q_proj": 1}, {"lm_head": 1}, {}):
        with pytest.raises(ValueError, match="not linear layers"):
            match_modules(wrong, known)


def test_an_adapter_comes_and_goes_and_the_base_answers_as_before(tmp_path: Path) -> None:
    base = load_base(BaseSpec(str(tiny_llama(tmp_path / "base"))), task="causal_lm")
    ids = torch.tensor([[5, 6, 7]])
    before = base.model(input_ids=ids).logits
    bank = AdapterBank(base)
    for seed, name in enumerate(("x.1@abc", "y@abc")):
        bank.load(name, random_adapter(tmp_path / str(seed), base.folder, "causal_lm", seed=seed))
    mixed = bank.model(input_ids=ids.repeat(2, 1), **bank.rows(["x.1@abc", None])).logits
    assert torch.allclose(mixed[1], before[0], atol=1e-5)
    assert not torch.allclose(mixed[0], before[0], atol=1e-2)
    with pytest.raises(AdapterExists):
        bank.load("y@abc", tmp_path / "0")
    bank.unload("x.1@abc")
    with pytest.raises(AdapterNotFound):
        bank.rows(["x.1@abc"])
    bank.unload("y@abc")
    assert torch.equal(base.model(input_ids=ids).logits, before)


def test_an_adapter_that_would_change_other_rows_is_refused(tmp_path: Path) -> None:
    base = load_base(BaseSpec(str(tiny_llama(tmp_path / "base"))), task="causal_lm")
    folder = random_adapter(tmp_path / "a", base.folder, "causal_lm", seed=0)
    config = json.loads((folder / "adapter_config.json").read_text())
    bank = AdapterBank(base)
    for change in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"r": 4}):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(AdapterInvalid):
            bank.load("a", folder)
        assert bank.names == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layer_replication": [[0, 2], [0, 2]]}, "sets layer_replication"),
        (
            {"peft_type": "BOFT", "boft_block_size": 4, "init_lora_weights": None, "megatron_core": None},
            r"does not know its method \(BOFTConfig\)",
        ),
    ],
)
def test_what_this_engine_would_serve_otherwise_than_it_was_trained_is_refused_by_its_name(
    tmp_path: Path, plain_llama: Path, change: dict[str, Any], why: str
) -> None:
    folder = random_adapter(tmp_path / "a", plain_llama, "causal_lm", seed=0)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterInvalid, match=why):
        AdapterBank(load_base(BaseSpec(str(plain_llama)), task="causal_lm")).load("a", folder)


@pytest.mark.parametrize("feature", [*FEATURES, "biases of B"])
def test_what_a_lora_can_ask_for_is_done_as_peft_does_it_or_refused(tmp_path: Path, plain_llama: Path, feature: str) -> None:
    """No third outcome: never loaded and wrong, never loaded and without effect."""
    folder = featured_adapter(tmp_path / "a", plain_llama, seed=1, **FEATURES.get(feature, {"lora_bias": True}))
    base = load_base(BaseSpec(str(plain_llama)), task="causal_lm")
    bank, ids = AdapterBank(base), torch.tensor([[5, 6, 7, 8]])
    before = base.model(input_ids=ids).logits
    try:
        bank.load("a", folder)
    except AdapterInvalid:
        assert feature in {"added tokens", "biases", "PiSSA"}
        assert torch.equal(base.model(input_ids=ids).logits, before)
        return
    wanted = plain_peft(plain_llama, folder)(input_ids=ids).logits
    if bank.group("a") is None:
        mixed = bank.model(input_ids=ids.repeat(2, 1), **bank.rows(["a", None])).logits
    else:  # it runs apart: the base's rows never meet it
        assert feature in {"dora", "whole embeddings", "biases of B"}
        mixed = torch.cat([bank.model_of(bank.group(name))(input_ids=ids).logits for name in ("a", None)])
    assert torch.allclose(mixed[0], wanted[0], atol=1e-4)
    assert torch.allclose(mixed[1], before[0], atol=1e-4)
    assert not torch.allclose(wanted, before, atol=1e-2)
