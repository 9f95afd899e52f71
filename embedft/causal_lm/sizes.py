"""The largest batch that a language-model recipe will meet, from its rows and tokenizer alone."""

from pathlib import Path

from embedft.base import BaseSpec, compute_dtype, config_folder, source_folder
from embedft.causal_lm.batches import SHAPES, LengthGrouped, learnt_places, learnt_tail, pack
from embedft.causal_lm.template import template_of
from embedft.model_folder import lengths, read_json, tokenizer_of
from embedft.plan import Batch
from embedft.recipe import CausalLMRecipe
from embedft.shapes import rounded
from embedft.training.arguments import steps_an_epoch, total_steps


def largest_batch(recipe: CausalLMRecipe) -> Batch:
    """Of the first epoch; each row of full length where the recipe's data is not there yet."""
    from embedft.causal_lm.train import read_split, tokenized, within

    spec = BaseSpec(recipe.base.model, "none", recipe.base.revision)
    folder = config_folder(spec)
    recipe = within(recipe, lengths(folder, read_json(folder / "config.json"))[1])
    settings = recipe.train
    if not recipe.data.train.startswith("hf://") and not Path(recipe.data.train).is_file():
        tokens, length = float(settings.batch * settings.max_length), settings.max_length
        return Batch(settings.batch, (length,), length, settings.max_steps or 0, tokens)
    tokenizer = tokenizer_of(folder if any(folder.glob("tokenizer*")) else source_folder(spec))
    examples = tokenized(read_split(recipe).train, template_of(tokenizer, recipe.data.template), recipe)
    tails = [learnt_tail(example) for example in examples]
    packs = pack(examples, length=settings.max_length) if settings.packing else []
    rows = packs or examples
    sizes = [len(row.ids) for row in rows]
    order = list(LengthGrouped(sizes, batch=settings.batch, seed=settings.seed))
    batches = [order[i : i + settings.batch] for i in range(0, len(order), settings.batch)]
    largest = max(batches, key=lambda batch: len(batch) * max(sizes[i] for i in batch))
    length = rounded(max(sizes[i] for i in largest), compute_dtype(), steps=SHAPES)
    learnt = len(learnt_places([packs[i] for i in largest])) if packs else 1 + max(tails[i] for i in largest)
    kept = min(length, rounded(learnt, compute_dtype(), steps=SHAPES))
    steps = total_steps(settings, steps_an_epoch(len(rows), settings))
    return Batch(len(largest), (length,), kept, steps, sum(len(b) * max(sizes[i] for i in b) for b in batches) / len(batches))
