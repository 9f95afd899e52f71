"""Packing, gradient checkpointing, validation: what changes the cost of a run and must not change what is learnt."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec, load_base
from embedft.causal_lm import batches
from embedft.causal_lm.attention import apart, attend, install
from embedft.causal_lm.batches import Collate, Pack, PackedCollate, in_passes, pack, packing_fault
from embedft.causal_lm.sizes import batch_for
from embedft.causal_lm.template import IGNORED, Example, template_of
from embedft.causal_lm.train import best_checkpoint, build_trainer, check_packing, read_split, tokenized, train
from embedft.errors import BaseError, MethodUnsupported, RecipeError
from embedft.methods import METHODS, attach
from embedft.plan import plan
from embedft.recipe import AdapterSection, CausalLMTrain
from embedft.training.together import check_together
from tests.embedft.methods.cells import WHOLE, small
from tests.families import DECODERS, tiny_decoder
from tests.fixtures_lm import planted_recipe, planted_rows, write_jsonl


@pytest.fixture
def parts(tiny_base: Path, tmp_path: Path) -> Any:
    recipe = planted_recipe(tmp_path, tiny_base, test_rows=0, train={"max_steps": 4, "max_length": 96})
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    examples = tokenized(read_split(recipe).train, template_of(base.tokenizer), recipe)
    install()
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
    packed = losses(base.model, batch)[0]
    alone = Collate(base.tokenizer.pad_token_id, dtype)
    start = 0
    for length in batch["attention_mask"].flatten().tolist():
        ids = tuple(batch["input_ids"][0, start : start + length].tolist())
        example = next(example for example in examples if example.ids == ids)
        own = packed[start : start + length - 1]  # the loss of a token stands before it
        assert float(own.sum()) == pytest.approx(float(losses(base.model, alone([example])).sum()), rel=1e-4, abs=1e-4)
        start += length
    assert start == sum(len(example.ids) for example in examples)
    assert float(packed[start - 1 :].sum()) == 0


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
        ({"_attn_implementation": "eager"}, "cannot keep examples apart"),
        ({"layer_types": ["conv"]}, "carry a state"),
    ],
)
def test_a_base_that_would_see_past_an_example_is_not_packed(
    parts: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], fault: str
) -> None:
    recipe, base, _ = parts
    for key, value in changes.items():
        monkeypatch.setattr(base.model.config, key, value, raising=False)
    with pytest.raises(BaseError, match=rf"{fault}.* set train\.packing=false"):
        check_packing(base.model, recipe.train.model_copy(update={"packing": True}))


def test_the_plan_of_a_base_that_is_not_packed_says_so(tmp_path: Path) -> None:
    base = tiny_decoder(tmp_path / "base", "gpt_oss")
    recipe = planted_recipe(tmp_path, base, train={"packing": True})
    with pytest.raises(BaseError, match=r"cannot keep examples apart: set train\.packing=false"):
        plan(recipe, batch_for(recipe))


def test_a_base_that_does_as_it_likes_with_its_mask_is_not_packed(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, base, _ = parts
    forward = base.model.forward
    settings = recipe.train.model_copy(update={"packing": True})

    def careless(attention_mask: Any, **named: Any) -> Any:
        size = named["input_ids"].shape[1]
        return forward(attention_mask=torch.ones(1, 1, size, size, dtype=torch.bool).tril(), **named)

    monkeypatch.setattr(base.model, "forward", careless)
    with pytest.raises(BaseError, match=r"not those that it gives alone: set train\.packing=false"):
        check_packing(base.model, settings)


UNPACKED = {"gptj", "bloom", "gpt_oss"}  # their attention is no sdpa in transformers
KINDS = ["gemma3_text", "cohere", "gpt_neox", "gptj", "gpt_bigcode", "opt", "bloom", "mixtral", "lfm2"]


@pytest.mark.parametrize("family", list(DECODERS) if WHOLE else KINDS)
def test_a_familys_examples_lose_in_a_row_what_they_lose_alone(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    install()
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder(tmp_path, family)).eval()
    fault = packing_fault(model, length=8)
    assert (fault is not None) == (family in UNPACKED), fault
    if fault is None:
        examples = [Example(ids, ids) for ids in (tuple(range(5, 5 + size)) for size in (3, 6, 8, 8))]
        packed = losses(model, PackedCollate(0, torch.float32)([Pack(tuple(examples[:2])), Pack(tuple(examples[2:]))]))
        alone = sum(float(losses(model, Collate(0, torch.float32)([example])).sum()) for example in examples)
        assert float(packed.sum()) == pytest.approx(alone, rel=1e-5)


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
    learnt = sum(label != IGNORED for example in examples[:24] for label in example.labels)
    assert len(kept) == learnt < 0.5 * batch["input_ids"].shape[1]
    whole = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[0, kept + 1] = batch["labels"][0]
    with torch.no_grad():
        loss, every = base.model(**batch).loss, base.model(**whole, labels=labels).loss
    assert float(loss) == pytest.approx(float(every), rel=1e-5)


def test_without_their_lengths_examples_would_see_each_other(parts: Any) -> None:
    _, base, examples = parts
    batch = PackedCollate(base.tokenizer.pad_token_id, torch.float32)(pack(examples[:24], length=96))
    size = batch["input_ids"].shape[1]
    causal = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
    assert not torch.allclose(losses(base.model, batch), losses(base.model, batch | {"attention_mask": causal}), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apart_is_what_a_mask_of_all_the_row_computes_with_its_gradients(dtype: torch.dtype) -> None:
    """Grouped heads, lengths far from each other, and tokens of no example at the end."""
    install()
    lengths, row, module = [1, 3, 5, 17, 18, 40], 96, SimpleNamespace(num_key_value_groups=2, training=True)
    torch.manual_seed(0)
    given = [torch.randn(1, heads, row, 16).to(dtype) for heads in (4, 2, 2)]
    owner = torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)] + [-1] * (row - sum(lengths)))
    seen = (owner[:, None] == owner[None]) & torch.ones(row, row, dtype=torch.bool).tril()
    weight = torch.randn(1, row, 4, 16).to(dtype)
    weight[:, sum(lengths) :] = 0
    found: list[Any] = []
    for mask in (apart(lengths, row), torch.tensor(lengths, dtype=torch.int32)[None, None, None], seen[None, None]):
        parts = [x.clone().requires_grad_() for x in given]
        made, _ = attend(module, *parts, mask)
        (made * weight).sum().backward()
        found.append([made[:, : sum(lengths)], *(x.grad for x in parts)])
    for one, moved, other in zip(*found, strict=True):
        assert torch.equal(one, moved), "as after a move to a GPU, which takes along the lengths alone"
        assert torch.allclose(one.float(), other.float(), atol=1e-5 if dtype == torch.float32 else 3e-2)
    assert all(torch.all(gradient[:, :, sum(lengths) :] == 0) for gradient in found[0][1:])


def test_packing_loses_and_repeats_nothing_and_keeps_to_the_length(parts: Any) -> None:
    _, _, examples = parts
    packs = pack(examples, length=96)
    assert max(len(made.ids) for made in packs) <= 96
    assert sorted(token for made in packs for token in made.ids) == sorted(token for example in examples for token in example.ids)
    assert sum(len(made.ids) for made in packs) / (96 * len(packs)) > 0.8


@pytest.mark.parametrize(
    ("method", "given", "remedy"),
    [
        ("prompt_tuning", {"packing": True}, r"set train\.packing=false"),
        ("prefix_tuning", {"packing": True}, r"set train\.packing=false"),
        ("prefix_tuning", {"gradient_checkpointing": True}, r"set train\.gradient_checkpointing=false"),
        ("lora_fa", {"optimizer": "adamw_8bit"}, r"leave train\.optimizer out"),
    ],
)
def test_what_does_not_go_together_is_told_before_the_base_is_loaded(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, given: dict[str, Any], remedy: str
) -> None:
    monkeypatch.delattr("embedft.causal_lm.train.load_base")
    recipe = planted_recipe(tmp_path, tiny_base, train=given)
    recipe = recipe.model_copy(update={"adapter": AdapterSection(method=method)})
    with pytest.raises(MethodUnsupported, match=remedy):
        train(recipe, store=AdapterStore(tmp_path / "s"), progress=False)
    with pytest.raises(MethodUnsupported, match=remedy):
        batch_for(recipe)


@pytest.mark.parametrize(("batch", "length", "together"), [(16, 256, 8), (12, 256, 6), (7, 256, 7), (7, 512, 1), (2, 4096, 1), (4, 96, 4)])
def test_on_a_cpu_packs_go_through_a_model_by_a_part_that_divides_their_batch(
    monkeypatch: pytest.MonkeyPatch, batch: int, length: int, together: int
) -> None:
    settings = CausalLMTrain(batch=batch, max_length=length, accumulate=3, packing=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (in_passes(settings).batch, in_passes(settings).accumulate) == (together, 3 * batch // together)
    whole = settings.model_copy(update={"packing": False})
    assert in_passes(whole) == whole
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert in_passes(settings) == settings


def test_a_batch_of_packs_in_many_passes_is_one_step(parts: Any, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three packs learn every token, and three a few."""
    recipe, base, examples = parts
    examples = [*examples[:15], *(Example(example.ids * 5, example.ids * 5) for example in examples[:3])]
    assert len(pack(examples, length=96)) == 6
    trained: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = recipe.train.model_copy(update={"packing": True, "batch": 6, "max_steps": 3})
    for most in (6 * 96, 2 * 96):
        monkeypatch.setattr(batches, "PASS", most)
        base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
        torch.manual_seed(0)
        model: Any = attach(base, recipe.adapter, task="causal_lm")
        trainer = build_trainer(model, base, examples, settings, folder=tmp_path)
        seen: list[int] = []
        hook = model.get_base_model().register_forward_pre_hook(
            lambda _, __, given, seen=seen: seen.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        trainer.train()
        hook.remove()
        assert max(seen) <= most
        assert trainer.state.global_step == 3
        assert len(seen) == 3 * 6 * 96 // most
        trained.append([value.detach() for value in model.parameters() if value.requires_grad])
    whole, parted = trained
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(whole, parted, strict=True))


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
    model: Any = attach(base, AdapterSection(**small(method)), task="causal_lm")
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
        model: Any = attach(base, AdapterSection(**small(method)), task="causal_lm")
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
        check_together(planted_recipe(tmp_path, tiny_base, train={"evaluate_every": 3}))
