"""Packing, gradient checkpointing, validation: what changes the cost of a run and must not change what is learnt."""

from pathlib import Path
from typing import Any

import pytest
import torch

from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec, load_base
from embedft.causal_lm.batches import Collate, PackedCollate, pack
from embedft.causal_lm.template import IGNORED, Example, template_of
from embedft.causal_lm.train import best_checkpoint, build_trainer, read_split, tokenized, train
from embedft.errors import BaseError, MethodUnsupported, RecipeError
from embedft.methods import METHODS, attach
from embedft.recipe import AdapterSection
from tests.fixtures_lm import planted_recipe, planted_rows, write_jsonl


@pytest.fixture
def parts(tiny_base: Path, tmp_path: Path) -> Any:
    recipe = planted_recipe(tmp_path, tiny_base, test_rows=0, train={"max_steps": 4, "max_length": 96})
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    examples = tokenized(read_split(recipe).train, template_of(base.tokenizer), recipe)
    return recipe, base, examples


def losses(model: Any, batch: dict[str, Any]) -> Any:
    """(batch, length) loss of what comes after each token, 0 where there is none."""
    labels = batch["labels"]
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if not key.endswith("labels")}).logits
    if "shift_labels" in batch:
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return torch.zeros(batch["input_ids"].shape).index_add_(1, batch["logits_to_keep"], each.view(len(labels), -1))
    each = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    return each.view(len(labels), -1)


@pytest.mark.parametrize(("inputs", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
def test_in_a_pack_each_examples_loss_equals_its_loss_alone(parts: Any, inputs: bool, dtype: torch.dtype) -> None:
    """In bf16 batches are a little longer than what is in them."""
    recipe, base, _ = parts
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_on_inputs": inputs})})
    examples = tokenized(read_split(recipe).train, template_of(base.tokenizer), recipe)[:24]
    packs = pack(examples, length=96)
    assert len(packs) < len(examples) / 2
    batch = PackedCollate(base.tokenizer.pad_token_id, dtype)(packs)
    packed = losses(base.model, batch)
    alone = Collate(base.tokenizer.pad_token_id, dtype)
    by_ids = {example.ids: float(losses(base.model, alone([example])).sum()) for example in examples}
    found = 0
    for row, made in enumerate(packs):
        segments = torch.tensor(made.segments)
        for number in range(int(segments.max()) + 1):
            places = (segments == number).nonzero()[:, 0]
            ids = tuple(made.ids[int(place)] for place in places)
            own = packed[row][(places[1:] - 1).tolist()]  # the loss of token k stands at k − 1
            assert float(own.sum()) == pytest.approx(by_ids[ids], rel=1e-4, abs=1e-4)
            found += 1
    assert found == len(examples)


def test_in_a_padded_batch_no_token_is_learnt_from_the_padding_before_it(parts: Any) -> None:
    recipe, base, _ = parts
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_on_inputs": True})})
    examples = tokenized(read_split(recipe).train, template_of(base.tokenizer), recipe)[:6]
    examples = [Example(example.ids[place % 3 :], example.labels[place % 3 :]) for place, example in enumerate(examples)]
    collate = Collate(base.tokenizer.pad_token_id, torch.float32)
    together = losses(base.model, collate(examples)).sum(1)
    for example, loss in zip(examples, together, strict=True):
        assert float(loss) == pytest.approx(float(losses(base.model, collate([example])).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sliding_window": 64}, "attends to 64 tokens"),
        ({"_attn_implementation": "eager"}, "takes no mask"),
        ({"layer_types": ["conv"]}, "carry a state"),
    ],
)
def test_a_base_that_would_see_past_an_example_is_not_packed(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], fault: str
) -> None:
    recipe, base, examples = parts
    model = attach(base, AdapterSection(r=4), task="causal_lm")
    for key, value in changes.items():
        monkeypatch.setattr(base.model.config, key, value, raising=False)
    with pytest.raises(BaseError, match=rf"{fault}.* set train\.packing=false"):
        build_trainer(model, base, examples, recipe.train.model_copy(update={"packing": True}), folder=tmp_path)


def test_a_batch_in_bf16_is_a_little_longer_and_no_loss_is_another(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedft.causal_lm.batches.SHAPES", 1)  # up to a power of two
    _, base, examples = parts
    plain, filled = (Collate(base.tokenizer.pad_token_id, dtype) for dtype in (torch.float32, torch.bfloat16))
    longer = 0
    for start in range(0, 24, 4):
        chosen = examples[start : start + 4]
        one, other = plain(chosen), filled(chosen)
        longer += other["input_ids"].shape[1] - one["input_ids"].shape[1]
        assert torch.allclose(losses(base.model, one).sum(1), losses(base.model, other).sum(1), rtol=1e-4, atol=1e-4)
    assert longer > 0


def test_a_packed_batch_has_logits_only_before_what_is_learnt_and_the_loss_of_all(parts: Any) -> None:
    _, base, examples = parts
    packs = pack(examples[:24], length=96)
    batch = PackedCollate(base.tokenizer.pad_token_id, torch.float32)(packs)
    kept = batch["logits_to_keep"]
    assert len(kept) < 0.8 * batch["input_ids"].shape[1]
    whole = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    labels = torch.tensor([[*made.labels, *[IGNORED] * (batch["input_ids"].shape[1] - len(made.labels))] for made in packs])
    with torch.no_grad():
        loss, every = base.model(**batch).loss, base.model(**whole, labels=labels).loss
    assert float(loss) == pytest.approx(float(every), rel=1e-5)
    assert (batch["labels"] != IGNORED).sum() == (labels != IGNORED).sum()


def test_a_mask_without_segments_would_let_examples_see_each_other(parts: Any) -> None:
    _, base, examples = parts
    batch = PackedCollate(base.tokenizer.pad_token_id, base.model.dtype)(pack(examples[:24], length=96))
    causal = torch.ones_like(batch["attention_mask"]).tril()
    assert not torch.allclose(losses(base.model, batch), losses(base.model, batch | {"attention_mask": causal}), atol=1e-2)


def test_packing_loses_and_repeats_nothing_and_keeps_to_the_length(parts: Any) -> None:
    _, _, examples = parts
    packs = pack(examples, length=96)
    assert max(len(made.ids) for made in packs) <= 96
    assert sorted(token for made in packs for token in made.ids) == sorted(token for example in examples for token in example.ids)
    assert sum(len(made.ids) for made in packs) / (96 * len(packs)) > 0.8


@pytest.mark.parametrize(
    ("method", "setting"), [("prompt_tuning", "packing"), ("prefix_tuning", "packing"), ("prefix_tuning", "gradient_checkpointing")]
)
def test_what_does_not_go_together_is_refused(parts: Any, tmp_path: Path, method: str, setting: str) -> None:
    recipe, base, examples = parts
    model = attach(base, AdapterSection(method=method, r=4), task="causal_lm")
    with pytest.raises(MethodUnsupported, match=rf"set train\.{setting}=false"):
        build_trainer(model, base, examples, recipe.train.model_copy(update={setting: True}), folder=tmp_path)


@pytest.mark.parametrize(
    ("method", "given", "remedy"),
    [
        ("prefix_tuning", {"packing": True}, r"set train\.packing=false"),
        ("lora_fa", {"optimizer": "adamw_8bit"}, r"leave train\.optimizer out"),
    ],
)
def test_what_does_not_go_together_is_told_before_the_base_is_scored(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, given: dict[str, Any], remedy: str
) -> None:
    monkeypatch.delattr("embedft.causal_lm.train.evaluate_generation")
    recipe = planted_recipe(tmp_path, tiny_base, train=given)
    recipe = recipe.model_copy(update={"adapter": AdapterSection(method=method)})
    with pytest.raises(MethodUnsupported, match=remedy):
        train(recipe, store=AdapterStore(tmp_path / "s"), progress=False)


def test_a_packed_run_learns_the_task(tiny_base: Path, tmp_path: Path) -> None:
    settings = {"packing": True, "max_length": 96, "epochs": 6, "batch": 4}
    result: Any = train(planted_recipe(tmp_path, tiny_base, train=settings), store=AdapterStore(tmp_path / "s"), progress=False)
    assert result.metrics["adapter"]["exact_match"] > result.metrics["base"]["exact_match"] + 0.5


def test_gradient_checkpointing_changes_no_gradient(parts: Any, tmp_path: Path, tiny_base: Path) -> None:
    recipe, _, examples = parts
    trained: list[Any] = []
    for checkpointing in (False, True):
        base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
        torch.manual_seed(0)
        model: Any = attach(base, recipe.adapter, task="causal_lm")
        settings = recipe.train.model_copy(update={"gradient_checkpointing": checkpointing})
        build_trainer(model, base, examples, settings, folder=tmp_path).train()
        trained.append([value.detach() for value in model.parameters() if value.requires_grad])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*trained, strict=True))


OF_EACH_FORM = [name for name, row in METHODS.items() if row.form != "lora" or name == "dora"]


@pytest.mark.parametrize("method", [name for name in OF_EACH_FORM if METHODS[name].packing])
def test_what_the_table_says_can_be_packed_loses_in_a_pack_what_it_loses_alone(parts: Any, method: str) -> None:
    _, base, examples = parts
    model: Any = attach(base, AdapterSection(method=method, r=4), task="causal_lm")
    stir(model)
    packs = pack(examples[:24], length=96)
    packed = losses(model, PackedCollate(base.tokenizer.pad_token_id, torch.float32)(packs)).sum()
    alone = Collate(base.tokenizer.pad_token_id, torch.float32)
    each = sum(float(losses(model, alone([example])).sum()) for example in examples[:24])
    assert float(packed) == pytest.approx(each, rel=1e-4)
    adapted = losses(model, alone(examples[:24]))
    with model.disable_adapter():
        assert not torch.allclose(losses(model, alone(examples[:24])), adapted, rtol=1e-3), "the adapter has an effect"


@pytest.mark.parametrize("method", [name for name in OF_EACH_FORM if METHODS[name].checkpointing])
def test_what_the_table_says_can_be_checkpointed_learns_the_same(parts: Any, tmp_path: Path, tiny_base: Path, method: str) -> None:
    recipe, _, examples = parts
    trained: list[Any] = []
    for checkpointing in (False, True):
        base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
        torch.manual_seed(0)
        model: Any = attach(base, AdapterSection(method=method, r=4), task="causal_lm")
        stir(model)
        settings = recipe.train.model_copy(update={"gradient_checkpointing": checkpointing, "max_steps": 2})
        build_trainer(model, base, examples, settings, folder=tmp_path).train()
        trained.append([value.detach() for value in model.parameters() if value.requires_grad])
    assert trained[0]
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(*trained, strict=True))


def stir(model: Any) -> None:
    """Away from a start that does nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))


def test_the_best_step_is_published_and_waiting_ends(tiny_base: Path, tmp_path: Path) -> None:
    """Validation rows that contradict the training rows: the loss on them is least at the first evaluation."""
    answers = list(dict.fromkeys(row["completion"] for row in planted_rows(6)))
    others = [row | {"completion": answers[(answers.index(row["completion"]) + 1) % 6]} for row in planted_rows(24, start=500)]
    write_jsonl(tmp_path / "validation.jsonl", others)
    settings = {"evaluate_every": 2, "patience": 3, "epochs": 3, "schedule": "constant", "warmup": 0.0}
    recipe = planted_recipe(tmp_path, tiny_base, test_rows=0, train=settings)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"validation": str(tmp_path / "validation.jsonl")})})
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    split = read_split(recipe)
    examples, held_out = (tokenized(rows, template_of(base.tokenizer), recipe) for rows in (split.train, split.validation))
    torch.manual_seed(0)
    trainer = build_trainer(
        attach(base, recipe.adapter, task="causal_lm"), base, examples, recipe.train, folder=tmp_path, validation=held_out
    )
    watch = best_checkpoint(trainer, recipe.train, folder=tmp_path)
    trainer.train()
    best, last = watch.best, watch.history[-1]
    assert best[1] > last[1]
    assert trainer.state.global_step == best[0] + 3 * 2 < 60
    assert watch.restore(name="p")["step"] == best[0]
    assert -trainer.evaluate()["eval_loss"] == pytest.approx(best[1], rel=1e-4)


def test_validation_rows_without_evaluations_are_a_fault_of_the_recipe(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.validation and train\.evaluate_every go together"):
        read_split(planted_recipe(tmp_path, tiny_base, train={"evaluate_every": 3}))
