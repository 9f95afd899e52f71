"""Methods whose parameters stand before the input: how they begin, and that padding is nothing to them."""

from pathlib import Path
from typing import Any, cast

import pytest

from embedft.adapters.store import AdapterStore
from embedft.causal_lm.train import train as train_lm
from embedft.embedding.train import train as train_embedding
from embedft.errors import MethodUnsupported
from embedft.recipe import CausalLMRecipe, EmbeddingRecipe, parse_recipe
from tests import families
from tests.embedft.methods.cells import cell, trained, weights
from tests.fixtures_embedding import planted_rows, write_rows
from tests.fixtures_lm import write_jsonl


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning", "prompt_tuning", "multitask_prompt_tuning"])
def test_an_answer_does_not_depend_on_the_padding_of_its_batch(llama: Path, tmp_path: Path, method: str) -> None:
    import torch

    made = cell(tmp_path, llama, "causal_lm", method, "none")
    model = trained(made).eval()
    ids = torch.tensor([[0, 0, 0, 9, 8, 7], [3, 4, 5, 6, 7, 8]])
    mask = (ids > 0).long()
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits[0, 3:]
        alone = model(input_ids=ids[:1, 3:]).logits[0]
        made_together = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
        made_alone = model.generate(input_ids=ids[:1, 3:], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.allclose(padded, alone, atol=1e-4)
    assert torch.equal(made_together[0, 6:], made_alone[0, 3:])


def test_llama_adapter_begins_with_closed_gates(llama: Path, tmp_path: Path) -> None:
    made = cell(tmp_path, llama, "causal_lm", "llama_adapter", "none")
    gates = weights(made.model, "adaption_gate")
    assert gates
    assert all(float(value.abs().max()) == 0 for value in gates.values())
    assert any(float(value.abs().max()) > 0 for value in weights(trained(made), "adaption_gate").values())


@pytest.mark.parametrize("task", ["causal_lm", "embedding"])
@pytest.mark.parametrize("method", ["prompt_tuning", "multitask_prompt_tuning", "p_tuning"])
def test_virtual_tokens_begin_as_words(bases: dict[str, Path], tmp_path: Path, method: str, task: str) -> None:
    import torch

    made = cell(tmp_path, bases[task], task, method, "none")
    words = made.base.model.get_input_embeddings().weight
    tasks = torch.zeros(1, dtype=torch.long) if method == "multitask_prompt_tuning" else None
    prompts = made.model.get_prompt(batch_size=1, task_ids=tasks)[0].detach()
    nearest = torch.cdist(prompts, words).argmin(1)
    assert len(set(nearest.tolist())) > 1
    lost = (prompts - words[nearest]).norm(dim=1) / words[nearest].norm(dim=1)
    assert float(lost.max()) < (0.15 if tasks is not None else 1e-3)  # a task's own factors begin near one, not at it


def test_a_prefix_begins_as_the_keys_and_values_of_words(llama: Path, tmp_path: Path) -> None:
    import torch

    from embedft.methods.prompts import key_values

    made = cell(tmp_path, llama, "causal_lm", "prefix_tuning", "none")
    base = made.base.model
    with torch.no_grad():
        cache = base(input_ids=torch.arange(base.config.vocab_size)[:, None], use_cache=True).past_key_values.layers
    for layer, (keys, values) in enumerate(key_values(made.model)):
        first = torch.cat([keys[:, 0], values[:, 0]]).flatten()  # the first virtual token saw nothing before it
        of_words = torch.cat([cache[layer].keys[:, :, 0], cache[layer].values[:, :, 0]], dim=1).flatten(1)
        assert float((of_words - first).norm(dim=1).min() / first.norm()) < 1e-3


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_virtual_tokens_and_text_stay_within_the_positions_that_a_base_has_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """Rows, prompts and answers that would each fill all positions alone. A base that learnt 200 cannot place one more."""
    monkeypatch.setitem(families.DECODERS, "opt", families.DECODERS["opt"] | {"max_position_embeddings": 200})
    base = families.tiny_decoder(tmp_path / "base", "opt")
    rows = [{"prompt": "red", "completion": "stop " * 200}] * 24
    long = [{"prompt": "what does red mean " * 40, "completion": "stop"}]
    content: Any = {
        "task": "causal_lm",
        "name": "p",
        "base": {"model": str(base)},
        "adapter": {"method": method, "r": 8},
        "data": {"train": str(write_jsonl(tmp_path / "a.jsonl", rows)), "eval": str(write_jsonl(tmp_path / "b.jsonl", rows[:2] + long))},
        "train": {"max_steps": 2, "max_length": 200, "lr": 0.1},
        "eval": {"max_new_tokens": 6},
    }
    store, recipe = AdapterStore(tmp_path / "store"), cast("CausalLMRecipe", parse_recipe(content))
    train_lm(recipe, store=store, progress=False)
    assert store.passport("p").max_length == 192
    assert "the base has 200 positions, 8 of them for virtual tokens; train.max_length=200 is cut" in capsys.readouterr().err
    many = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"r": 199})})
    with pytest.raises(MethodUnsupported, match=r"with 199 virtual tokens: the base has 200 positions.*lower adapter\.r"):
        train_lm(many, store=store, progress=False)


def test_an_encoder_reads_less_of_a_text_behind_virtual_tokens(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [{key: f"{value} " * 40 for key, value in row.items()} for row in planted_rows(12)]
    content: Any = {
        "task": "embedding",
        "name": "e",
        "base": {"model": str(bases["embedding"])},
        "adapter": {"method": "prompt_tuning", "r": 8},
        "data": {"train": write_rows(tmp_path / "rows.jsonl", rows)},
        "train": {"batch": 4, "max_steps": 2, "max_length": 64, "lr": 0.3},
        "eval": {"guard": None},
    }
    store = AdapterStore(tmp_path / "store")
    train_embedding(cast("EmbeddingRecipe", parse_recipe(content)), store=store, progress=False)
    assert store.passport("e").max_length == 56, "of 64 positions"
