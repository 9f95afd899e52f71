"""The largest batch that an embedding recipe will meet, from its rows and tokenizer alone."""

from pathlib import Path

from embedft.base import BaseSpec, config_folder, source_folder
from embedft.embedding.data import load_data, split_dev
from embedft.embedding.losses import loss_named
from embedft.embedding.train import batch_plan, used_negatives
from embedft.encode import EncodeSettings, TextPreparer
from embedft.model_folder import longest
from embedft.plan import Batch
from embedft.recipe import EmbeddingRecipe
from embedft.training.arguments import steps_an_epoch, total_steps


def largest_batch(recipe: EmbeddingRecipe) -> Batch:
    """Of the first epoch, padded as `plan` traces it; two columns of full length where the recipe's data is not there yet."""
    settings, given = recipe.train, recipe.data.train
    if not given.startswith("hf://") and not Path(given).exists():
        tokens, length = float(2 * settings.batch * settings.max_length), settings.max_length
        return Batch(settings.batch, (length, length), 0, settings.max_steps or 0, tokens)
    loss = loss_named(recipe.loss.name)
    examples, _ = load_data(recipe.data, recipe.eval, scored=loss.takes == "scored", taught=loss.takes == "distilled")
    if settings.evaluate_every is not None:
        examples, _ = split_dev(examples, recipe.data.dev)
    spec = BaseSpec(recipe.base.model, "none", recipe.base.revision)
    folder = config_folder(spec)
    folder = folder if (folder / "tokenizer.json").is_file() else source_folder(spec)
    length = min(settings.max_length, longest(folder))
    preparer = TextPreparer(folder, EncodeSettings("mean", True, length, recipe.data.prompts.model_dump()))
    columns = [[row.query for row in examples.rows], [row.document for row in examples.rows]]
    columns += [[row.negatives[number] for row in examples.rows] for number in range(used_negatives(examples, loss))]
    sides = ["query", *["document"] * (len(columns) - 1)]
    lengths = [[len(ids) for ids in preparer.prepare(texts, side).ids] for texts, side in zip(columns, sides, strict=True)]  # type: ignore[arg-type]
    batches = list(batch_plan(examples, recipe, loss=loss, padded=True))
    padded = [tuple(max(column[i] for i in batch) for column in lengths) for batch in batches]
    tokens = [len(batch) * sum(sizes) for batch, sizes in zip(batches, padded, strict=True)]
    most = tokens.index(max(tokens))
    steps = total_steps(settings, steps_an_epoch(len(batches) * settings.batch, settings))
    return Batch(len(batches[most]), padded[most], 0, steps, sum(tokens) / len(tokens))
