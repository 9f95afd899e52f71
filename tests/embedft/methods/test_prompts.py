"""Methods whose parameters stand before the input: how they begin, and that padding is nothing to them."""

from pathlib import Path

import pytest

from tests.embedft.methods.cells import cell, trained, weights


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
