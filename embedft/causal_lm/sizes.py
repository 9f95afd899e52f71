"""The largest batch that a language-model recipe will meet, from its rows and tokenizer alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embedft.base import BaseSpec, compute_dtype, config_folder, source_folder
from embedft.causal_lm.batches import SHAPES, LengthGrouped, Pack, PackedCollate, in_passes, learnt_tail, pack
from embedft.causal_lm.evaluate import pad_token
from embedft.causal_lm.template import Example, template_of
from embedft.model_folder import lengths, read_json, tokenizer_of
from embedft.plan import Batch
from embedft.recipe import CausalLMRecipe
from embedft.shapes import rounded
from embedft.training.arguments import steps_an_epoch, total_steps
from embedft.training.together import check_together


def batch_for(recipe: CausalLMRecipe) -> Callable[[Any], Batch]:
    """For `plan`: the largest batch, if the model that it is given can be trained on it so. What the trainer refuses before it loads a
    model is refused at once: MethodUnsupported, RecipeError, DataError; of the model itself BaseError."""
    from embedft.causal_lm.train import check_packing

    recipe = placed(recipe)
    batch = largest_batch(recipe)

    def of(model: Any) -> Batch:
        check_packing(model.get_base_model(), recipe.train, weights=False)
        return batch

    return of


def placed(recipe: CausalLMRecipe) -> CausalLMRecipe:
    """The recipe as it will be trained: its rows no longer than the base can place. Raises MethodUnsupported, RecipeError."""
    from embedft.causal_lm.train import within

    check_together(recipe)
    folder = config_folder(BaseSpec(recipe.base.model, "none", recipe.base.revision))
    return within(recipe, lengths(folder, read_json(folder / "config.json"))[1])


def largest_batch(recipe: CausalLMRecipe) -> Batch:
    """Of the first epoch, or as much of it as goes through the model at once; each row of full length where the recipe's data is not
    there yet. Raises MethodUnsupported."""
    from embedft.causal_lm.train import read_split, tokenized

    recipe = placed(recipe)
    spec = BaseSpec(recipe.base.model, "none", recipe.base.revision)
    folder = config_folder(spec)
    settings, together = recipe.train, in_passes(recipe.train).batch
    if not recipe.data.train.startswith("hf://") and not Path(recipe.data.train).is_file():
        tokens, length = float(settings.batch * settings.max_length), settings.max_length
        if settings.packing:
            row = (0,) * length
            return _packed([Pack((Example(row, row),))] * together, settings.max_steps, tokens=tokens, pad=0)
        return Batch(settings.batch, (length,), length, settings.max_steps, tokens)
    tokenizer = tokenizer_of(folder if any(folder.glob("tokenizer*")) else source_folder(spec))
    examples = tokenized(read_split(recipe).train, template_of(tokenizer, recipe.data.template), recipe)
    packs = pack(examples, length=settings.max_length) if settings.packing else []
    rows = packs or examples
    sizes = [len(row.ids) for row in rows]
    order = list(LengthGrouped(sizes, batch=settings.batch, seed=settings.seed))
    batches = [order[i : i + settings.batch] for i in range(0, len(order), settings.batch)]
    steps = total_steps(settings, steps_an_epoch(len(rows), settings))
    if packs:
        parts = [order[i : i + together] for i in range(0, len(order), together)]
        most = max(parts, key=lambda part: sum(sizes[i] for i in part))
        return _packed([packs[i] for i in most], steps, tokens=sum(sizes) / len(batches), pad=pad_token(tokenizer))
    largest = max(batches, key=lambda batch: len(batch) * max(sizes[i] for i in batch))
    length = rounded(max(sizes[i] for i in largest), compute_dtype(), steps=SHAPES)
    kept = min(length, rounded(1 + max(learnt_tail(examples[i]) for i in largest), compute_dtype(), steps=SHAPES))
    return Batch(len(largest), (length,), kept, steps, sum(len(b) * max(sizes[i] for i in b) for b in batches) / len(batches))


def _packed(packs: Sequence[Pack], steps: int | None, *, tokens: float, pad: int) -> Batch:
    def batch() -> dict[str, Any]:
        return PackedCollate(pad, compute_dtype())(packs)

    made = batch()
    return Batch(1, (made["input_ids"].shape[1],), len(made["logits_to_keep"]), steps, tokens, step=lambda call: call(**batch()).loss)
