"""The largest batch that an embedding recipe will meet, from its rows and tokenizer alone, and what the packed trainer makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.base import BaseSpec, config_folder, source_folder
from embedft.embedding.losses import MINI_BATCH, Loss, loss_named
from embedft.embedding.sets import read_sets
from embedft.embedding.train import (
    batch_plan,
    check_batches,
    check_dimensions,
    text_length,
    used_negatives,
)
from embedft.encode import EncodeSettings, TextPreparer
from embedft.model_folder import hidden_size, read_json
from embedft.model_folder import lengths as lengths_of
from embedft.plan import Batch
from embedft.recipe import EmbeddingRecipe
from embedft.sentence_folder import published
from embedft.training.arguments import steps_an_epoch, total_steps
from embedft.training.together import check_together

if TYPE_CHECKING:
    import torch

    from embedft.embedding.packed import PackedEncoder


def batch_for(recipe: EmbeddingRecipe) -> Callable[[Any], Batch]:
    """For `plan`: the largest batch as the trainer of the model that it is given will see it, packed or padded.

    What the trainer refuses before it loads a model is refused here: MethodUnsupported, RecipeError, DataError.
    """
    from embedft.embedding.packed import unpackable

    def of(model: Any) -> Batch:
        packed = recipe.base.quantization != "int8" and unpackable(model) is None  # here the model is laid out unquantized
        return largest_batch(recipe, packed=packed)

    return of


def largest_batch(recipe: EmbeddingRecipe, *, packed: bool = False) -> Batch:
    """Of the first epoch; two columns of full length where the recipe's data is not there yet."""
    settings, given = recipe.train, recipe.data.train
    check_together(recipe)
    loss, spec = loss_named(recipe.loss.name), BaseSpec(recipe.base.model, "none", recipe.base.revision)
    folder = config_folder(spec)
    config = read_json(folder / "config.json")
    check_dimensions(recipe.loss.dimensions, hidden_size(folder, config))
    if not given.startswith("hf://") and not Path(given).exists():
        tokens, length = float(2 * settings.batch * settings.max_length), settings.max_length
        step = _packed_step(recipe, loss, [[length] * settings.batch] * 2, _Frozen([], [])) if packed else None
        return Batch(settings.batch, (length, length), 0, settings.max_steps, tokens, step)
    examples = read_sets(recipe).examples
    folder = folder if (folder / "tokenizer.json").is_file() else source_folder(spec)
    length = text_length(recipe, *lengths_of(folder, config))
    prompts = recipe.data.prompts.over(published(folder, decoder=False).prompts)
    preparer = TextPreparer(folder, EncodeSettings("mean", True, length, prompts))
    columns = [[row.query for row in examples.rows], [row.document for row in examples.rows]]
    columns += [[row.negatives[number] for row in examples.rows] for number in range(used_negatives(examples, loss))]
    sides = ["query", *["document"] * (len(columns) - 1)]
    lengths = [[len(ids) for ids in preparer.prepare(texts, side).ids] for texts, side in zip(columns, sides, strict=True)]  # type: ignore[arg-type]
    made = batch_plan(examples, recipe, loss=loss, padded=not packed)
    check_batches(made, name=recipe.name)
    batches = list(made)
    longest_of = [tuple(max(column[i] for i in batch) for column in lengths) for batch in batches]
    if packed:
        tokens = [sum(column[i] for column in lengths for i in batch) for batch in batches]
    else:
        tokens = [len(batch) * sum(sizes) for batch, sizes in zip(batches, longest_of, strict=True)]
    most = tokens.index(max(tokens))
    steps = total_steps(settings, steps_an_epoch(len(batches) * settings.batch, settings))
    rows, sizes = len(batches[most]), longest_of[most]
    average = sum(tokens) / len(tokens) / max(tokens) * rows * sum(sizes)
    if not packed:
        return Batch(rows, sizes, 0, steps, average)
    shown = [i for batch in batches[: steps * settings.accumulate] for i in batch]
    known = {(side, texts[i]): column[i] for side, texts, column in zip(sides, columns, lengths, strict=True) for i in shown}
    fixed = [length for (side, _), length in known.items() if side == "document" and recipe.adapter.side == "query"]
    moving = [length for (side, _), length in known.items() if side == "query" or recipe.adapter.side != "query"]
    frozen = _Frozen([*known.values()] if loss.guided else fixed, moving)
    step = _packed_step(recipe, loss, [[column[i] for i in batches[most]] for column in lengths], frozen)
    return Batch(rows, sizes, 0, steps, average, step, _prepare(recipe, frozen))


@dataclass(frozen=True)
class _Frozen:
    """Lengths of the texts of a run whose vectors never change, and of those whose states below the first adapted layer do not."""

    vectors: list[int]
    states: list[int]

    def kept(self, encoder: "PackedEncoder") -> "list[torch.Tensor]":
        """What a run holds of them in memory."""
        import torch

        from embedft.embedding.fast import MEMORY_BYTES

        total = sum(self.states) * encoder.width if encoder.first_adapted else 0
        states = [torch.empty(total, dtype=encoder.dtype)] if total * encoder.dtype.itemsize <= MEMORY_BYTES else []
        return [*states, torch.empty(len(self.vectors), encoder.width)]


def _encoder(model: Any, recipe: EmbeddingRecipe, longest: int) -> "PackedEncoder":
    import torch

    from embedft.embedding.packed import PackedEncoder

    encoder = PackedEncoder(model, EncodeSettings("mean", True, longest))
    if recipe.base.quantization == "nf4":  # laid out unquantized here; there it is unpacked once, for the whole run
        for projection in (each for layer in encoder.layers for each in layer.projections):
            projection.frozen = torch.empty_like(projection.frozen)
    return encoder


def _prepare(recipe: EmbeddingRecipe, frozen: _Frozen) -> "Callable[[Any], torch.Tensor] | None":
    """What the packed trainer computes before its first step, of the largest of the chunks that it takes."""
    import torch

    from embedft.embedding.fast import chunks

    def largest(lengths: list[int]) -> list[list[int]]:
        return [[0] * length for length in max(chunks(sorted(lengths), int), key=sum)] if lengths else []

    def before(model: Any) -> torch.Tensor:
        encoder = _encoder(model, recipe, max([*frozen.vectors, *frozen.states]))
        with torch.no_grad():
            kept = frozen.kept(encoder)
            with encoder.adapter_off():
                if texts := largest(frozen.vectors):
                    encoder.encode(texts)
            if encoder.first_adapted and (texts := largest(frozen.states)):
                kept += encoder.lower(texts)
        return torch.zeros((), requires_grad=True)

    return before if frozen.vectors or frozen.states else None


def _packed_step(recipe: EmbeddingRecipe, loss: Loss, lengths: Sequence[Sequence[int]], frozen: _Frozen) -> "Callable[[Any], torch.Tensor]":
    """The packed trainer's step over texts of these lengths, column by column. Vectors that stay as they are (a query-only adapter's
    documents) and states below the first adapted layer are there before the step, as in a run."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    moving = lengths[:1] if recipe.adapter.side == "query" else lengths
    held: list[Any] = []  # the trainer keeps every layer's merged weights, those below the first adapted one too

    def step(model: Any) -> torch.Tensor:
        encoder = _encoder(model, recipe, max(map(max, lengths)))
        held.extend([encoder, *frozen.kept(encoder)])
        texts = [[0] * length for column in moving for length in column]
        texts = sorted(texts, key=len)[-MINI_BATCH:] if loss.same_as else texts  # one piece at a time keeps its activations
        states = None
        if encoder.first_adapted:
            whole = torch.zeros(max(map(len, texts)), encoder.width, dtype=encoder.dtype)  # in a run they lie in what is kept
            states = [whole[: len(ids)] for ids in texts]
        vectors = normalize(encoder.encode(texts, states).float(), dim=-1)
        rows = len(moving[0])
        others = torch.zeros(rows, encoder.width) if len(vectors) <= rows else vectors[rows:]
        scores = 20.0 * vectors[:rows] @ others.T
        return cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))

    return step
