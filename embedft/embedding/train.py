"""A recipe → a published retrieval adapter: load, attach, fit, evaluate, publish. Reads like the flow."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.base import Base, BaseSpec, load_base
from embedft.embedding.batches import WINDOW, BatchPlan
from embedft.embedding.data import Examples, RetrievalSet
from embedft.embedding.evaluate import compare_towers, evaluate_retrieval
from embedft.embedding.guard import forgetting, general_set
from embedft.embedding.losses import Loss, loss_named
from embedft.embedding.proof import comparison, per_query
from embedft.embedding.sets import read_sets
from embedft.embedding.sided import SidedEncoder
from embedft.embedding.start import start_batches
from embedft.encode import EncodeSettings, Progress, TextPreparer, check_tokenizer
from embedft.errors import DataError, Forgotten, RecipeError
from embedft.recipe import EmbeddingRecipe
from embedft.records import sample
from embedft.training.together import check_together

if TYPE_CHECKING:
    from embedft.adapters.store import AdapterStore
    from embedft.training.best import BestCheckpoint
    from embedft.training.measure import AdapterResult, DryRunReport


def train(
    recipe: EmbeddingRecipe,
    *,
    store: "AdapterStore",
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    force: bool = False,
    encoded: Progress | None = None,
) -> "AdapterResult | DryRunReport":
    """Train, evaluate against base and BM25, and put the adapter into the store under `recipe.name`.

    `force`: even if it forgets too much. `encoded` is told of the texts that the evaluations after training encode.
    Raises DataError and MethodUnsupported before a model loads; BaseNotFound, ResumeRefused, TrainingInterrupted, and Forgotten after
    the adapter was saved.
    """
    from transformers import set_seed

    from embedft.methods import attach
    from embedft.training.loop import fit, rehearse
    from embedft.training.measure import PeakMemory
    from embedft.training.publish import Published, publish
    from embedft.training.run import open_run
    from embedft.training.trackers import tracked

    check_together(recipe)
    loss, sets = loss_named(recipe.loss.name), read_sets(recipe)
    examples = sets.examples
    _note_negatives(examples, loss, name=recipe.name)
    _note_left_out(examples, name=recipe.name)
    spec = recipe.eval.guard
    general = general_set(spec, trained={row.query for row in examples.rows}) if spec else None
    base = load_base(BaseSpec(recipe.base.model, recipe.base.quantization, recipe.base.revision), task="embedding")
    settings = settings_for(recipe, base)
    check_tokenizer(base.folder)
    _note_cut(TextPreparer(base.folder, settings), examples, recipe, own=base.info.max_length)
    check_dimensions(recipe.loss.dimensions, base.info.hidden_size)
    set_seed(recipe.train.seed)
    shown = start_batches(examples, base, settings, batch=recipe.train.batch, seed=recipe.train.seed)
    model = attach(base, recipe.adapter, task="embedding", batches=shown)
    plan = plan_for(examples, recipe, loss=loss, model=model)
    check_batches(plan, name=recipe.name)
    steps = ceil(len(plan) / recipe.train.accumulate)
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            short = recipe.train.model_copy(update={"max_steps": 2, "trackers": ()})
            short_recipe = recipe.model_copy(update={"train": short})
            trainer = make_trainer(model, base, settings, examples, short_recipe, plan=plan, output=Path(folder))
            return rehearse(trainer, recipe.train, name=recipe.name, examples=len(examples), steps_per_epoch=steps)
    fingerprint = base.info.fingerprint
    identity = sets.hash_with(general if spec and spec.data != "pydocs" else None)
    run = open_run(recipe, root=store.root, data_hash=identity, base_fingerprint=fingerprint, resume=resume, reading=asdict(settings))
    options: Any = {"side": recipe.adapter.side, "batch_size": recipe.eval.batch, "progress": encoded}
    metric = recipe.eval.metric
    with tracked(recipe.train.trackers, name=recipe.name) as tell:
        trainer = make_trainer(model, base, settings, examples, recipe, plan=plan, output=run.folder)
        best = best_checkpoint(trainer, model, base, settings, recipe, sets.dev, folder=run.folder) if sets.dev else None
        with PeakMemory() as peak:
            seconds = fit(trainer, run, name=recipe.name, progress=progress)
        chosen = {"best": best.restore(name=recipe.name)} if best else {}
        model.eval()
        towers = compare_towers(model, base.folder, settings, sets.judged, **options)
        tell({f"{way}/{metric}": result.metrics[metric] for way, result in towers.results.items()})
    guard = forgetting(model, base.folder, settings, spec, data=general, metric=metric, **options) if spec and general else None
    held = bool(guard and guard["held"] and not force)
    published = Published(
        metrics=comparison(towers, sets.judged, metric=metric) | chosen | ({"guard": guard} if guard else {}),
        held=held,
        data_hash=sets.hash,
        max_length=settings.max_length,
        seconds=seconds,
        peak_bytes=peak.bytes,
        settings=settings,
        dimensions=(base.info.hidden_size, *sorted(set(recipe.loss.dimensions), reverse=True)),
        rows=per_query(towers.results, sets.judged.queries if recipe.eval.keep_texts else None),
    )
    with run.ending():
        result = publish(model, base, recipe, store=store, published=published)
    if guard and held:
        raise Forgotten(
            recipe.name, path=result.path, data=guard["data"], base=guard["base"], adapter=guard["adapter"], bound=guard["bound"]
        )
    return result


def best_checkpoint(
    trainer: Any, model: Any, base: Base, settings: EncodeSettings, recipe: EmbeddingRecipe, dev: RetrievalSet, *, folder: Path
) -> "BestCheckpoint":
    """Let the trainer evaluate on the dev queries as it goes, and keep the best weights."""
    from embedft.training.best import BestCheckpoint

    encoder = SidedEncoder(model, base.folder, settings, side=recipe.adapter.side)
    batch, fixed = recipe.eval.batch, list[Any]()

    def evaluate() -> float:
        if recipe.adapter.side == "query" and not fixed:  # no step changes these
            fixed.append(encoder.encode(list(dev.documents.values()), input_type="document", batch_size=batch))
        found = evaluate_retrieval(encoder, dev, batch_size=batch, documents=fixed[0] if fixed else None).metrics[recipe.eval.metric]
        trainer.log({f"eval_{recipe.eval.metric}": found})
        return found

    assert recipe.train.evaluate_every is not None
    metric = f"{recipe.eval.metric} on the dev queries"
    return BestCheckpoint(trainer, folder, evaluate, metric=metric, every=recipe.train.evaluate_every, patience=recipe.train.patience)


def plan_for(examples: Examples, recipe: EmbeddingRecipe, *, loss: Loss, model: Any) -> BatchPlan:
    """The batches of a run of `model`."""
    from embedft.embedding.packed import unpackable

    return batch_plan(examples, recipe, loss=loss, padded=bool(unpackable(model)))


def batch_plan(examples: Examples, recipe: EmbeddingRecipe, *, loss: Loss, padded: bool) -> BatchPlan:
    """Sorted by length only where they will be padded."""
    exclusive, window = loss.takes == "pairs", WINDOW if padded else 1
    if exclusive and recipe.train.batch == 1 and not any(row.negatives for row in examples.rows):
        raise RecipeError("recipe", ["train.batch is 1; expected 2 or more: this loss learns from the other rows of a batch"])
    return BatchPlan(examples, batch=recipe.train.batch, seed=recipe.train.seed, exclusive=exclusive, window=window)


def settings_for(recipe: EmbeddingRecipe, base: Base) -> EncodeSettings:
    """The base's own pooling, normalisation and length, where the recipe does not say otherwise."""
    from embedft.methods import text_positions
    from embedft.training.progress import note

    given, prompts = recipe.base, recipe.data.prompts.over(base.info.prompts)
    if own := {kind: prompts[kind] for kind in base.info.prompts if getattr(recipe.data.prompts, kind) is None}:
        note(f"{recipe.name}: with the base's own prompts, {json.dumps(own, ensure_ascii=False)}; data.prompts changes them")
    if changed := {kind: text for kind, text in prompts.items() if text != base.info.prompts.get(kind, "")}:
        own = json.dumps({kind: base.info.prompts.get(kind, "") for kind in changed}, ensure_ascii=False)
        note(f"{recipe.name}: what is told of the base, too, is with the recipe's prompts; its own are {own}")
    left = text_positions(recipe.adapter, base.info.positions)
    if "max_length" in recipe.train.model_fields_set and recipe.train.max_length > left:
        virtual = f", {base.info.positions - left} of them for virtual tokens" if left < base.info.positions else ""
        note(f"{recipe.name}: the base has {base.info.positions} positions{virtual}; train.max_length={recipe.train.max_length} is cut")
    return EncodeSettings(
        pooling=given.pooling or base.info.pooling,
        normalize=base.info.normalize if given.normalize is None else given.normalize,
        max_length=text_length(recipe, base.info.max_length, base.info.positions),
        prompts=prompts,
    )


def text_length(recipe: EmbeddingRecipe, max_length: int, positions: int) -> int:
    """Tokens of a text that are read: by default no more than the base does by itself, on request as many as it can place (beside
    virtual tokens, in either case)."""
    from embedft.methods import text_positions

    left = text_positions(recipe.adapter, positions)
    return min(recipe.train.max_length, left, positions if "max_length" in recipe.train.model_fields_set else max_length)


def make_trainer(
    model: Any, base: Base, settings: EncodeSettings, examples: Examples, recipe: EmbeddingRecipe, *, plan: BatchPlan, output: Path
) -> Any:
    """A Trainer over the adapted model, packed where the model can run so; it writes nothing but checkpoints into `output`."""
    from embedft.embedding.packed import unpackable
    from embedft.training.arguments import hf_arguments

    common = hf_arguments(recipe.train, output_dir=output, steps_per_epoch=ceil(len(plan) / recipe.train.accumulate))
    make = _padded_trainer if unpackable(model) else _packed_trainer
    return make(model, base, settings, examples, recipe, plan=plan, common=common)


def _packed_trainer(
    model: Any, base: Base, settings: EncodeSettings, examples: Examples, recipe: EmbeddingRecipe, *, plan: BatchPlan, common: Any
) -> Any:
    from transformers import TrainingArguments

    from embedft.embedding.fast import Given, PackedModel, PackedTrainer, Texts
    from embedft.embedding.losses import MINI_BATCH
    from embedft.embedding.packed import PackedEncoder

    loss = loss_named(recipe.loss.name)
    preparer = TextPreparer(base.folder, settings)
    columns = dict(training_columns(examples, loss))
    labels = columns.pop("label", None)
    ids = {name: preparer.prepare(texts, "query" if name == "query" else "document").ids for name, texts in columns.items()}
    packed = PackedModel(
        model,
        PackedEncoder(model, settings),
        Texts(ids),
        side=recipe.adapter.side,
        rematerialize=MINI_BATCH if loss.same_as else None,
        guided=loss.guided,
    )
    plain = loss_named(loss.same_as) if loss.same_as else loss
    given, guide = (Given(base.info.hidden_size, base.tokenizer, key=key) for key in ("vectors", "guide"))
    objective = plain.build(given, scale=recipe.loss.scale, dimensions=recipe.loss.dimensions, guide=guide)
    return PackedTrainer(packed, TrainingArguments(**common, remove_unused_columns=False), loss=objective, plan=plan, labels=labels)


def _padded_trainer(
    model: Any, base: Base, settings: EncodeSettings, examples: Examples, recipe: EmbeddingRecipe, *, plan: BatchPlan, common: Any
) -> Any:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainingArguments

    from embedft.embedding.tower import PairTrainer, Unadapted, sentence_transformer

    loss = loss_named(recipe.loss.name)
    tower = sentence_transformer(model, base.folder, settings, hidden_size=base.info.hidden_size, side=recipe.adapter.side)
    columns = training_columns(examples, loss)
    guide = Unadapted(tower, base.tokenizer) if loss.guided else None
    sides: Any = {name: "query" if name == "query" else "document" for name in columns if name != "label"}
    return PairTrainer(
        model=tower,
        args=SentenceTransformerTrainingArguments(**common, router_mapping=sides),
        train_dataset=Dataset.from_dict(columns),
        loss=loss.build(tower, scale=recipe.loss.scale, dimensions=recipe.loss.dimensions, guide=guide),
        plan=plan,
    )


def training_columns(examples: Examples, loss: Loss) -> dict[str, list[Any]]:
    """Columns in the order that the losses expect: query, document, negative_1 …, or query, document, label."""
    rows = examples.rows
    columns: dict[str, list[Any]] = {"query": [row.query for row in rows], "document": [row.document for row in rows]}
    if loss.takes == "scored":
        columns["label"] = [row.score for row in rows]
        return columns
    for index in range(used_negatives(examples, loss)):
        columns[f"negative_{index + 1}"] = [row.negatives[index] for row in rows]
    if loss.takes == "distilled":
        columns["label"] = [list(row.scores[: 1 + examples.negatives]) for row in rows]
    return columns


def used_negatives(examples: Examples, loss: Loss) -> int:
    return examples.negatives if loss.most is None else min(loss.most, examples.negatives)


def _note_left_out(examples: Examples, *, name: str) -> None:
    from embedft.training.progress import note

    for line in examples.left_out:
        note(f"{name}: {line}")


def _note_cut(preparer: TextPreparer, examples: Examples, recipe: EmbeddingRecipe, *, own: int) -> None:
    """Of a thousand documents, how many are not read to their end, by the base neither: a user may think of what it reads by itself."""
    from embedft.training.progress import note

    length = preparer.settings.max_length
    documents = sample(list(dict.fromkeys(row.document for row in examples.rows)), 1000, key=str)
    if cut := preparer.prepare(documents, "document").truncated:
        more = f" (the base by itself reads {own})" if own > length else ""
        note(f"{recipe.name}: {cut / len(documents):.0%} of the documents are longer than the {length} tokens that are read of them{more}")


def _note_negatives(examples: Examples, loss: Loss, *, name: str) -> None:
    """A loss takes columns: as many negatives of every row as it knows, and as the row with the fewest has."""
    from embedft.training.progress import note

    used = used_negatives(examples, loss)
    most = max((len(row.negatives) for row in examples.rows), default=0)
    if loss.takes != "scored" and most > used:
        short = sum(len(row.negatives) == examples.negatives for row in examples.rows)
        why = (
            f"loss {loss.name!r} takes no more" if used < examples.negatives else f"{short} rows have no more, and every row gives as many"
        )
        note(f"{name}: {used} of up to {most} negatives a row are used: {why}")


def check_batches(plan: BatchPlan, *, name: str) -> None:
    from embedft.training.progress import note

    if not len(plan) and plan.rows > 1 and plan.shown < 2:
        raise DataError([f"the weights of the data show {plan.shown} of {plan.rows} rows an epoch: raise data.weight"])
    if plan.never:
        raise DataError([f"a weight of {plan.never[0]:g} shows none of its rows in any epoch: raise it, or leave the set out"])
    if not len(plan):
        raise DataError(["no two training rows may share a batch: all of them have one answer; expected rows with different documents"])
    if plan.alone > 1:  # one is what batches of a size leave over, another one every epoch
        note(
            f"{name}: {plan.alone} of {plan.shown} rows an epoch teach nothing: too many rows have the same documents, and those share no "
            "batch; a loss of triplets takes them all (`embedft data mine` adds the negatives, loss.name=triplet)"
        )


def check_dimensions(dimensions: Sequence[int], width: int) -> None:
    if too_many := [size for size in dimensions if size >= width]:
        raise RecipeError("recipe", [f"loss.dimensions: {too_many[0]}; expected less than the {width} of the base"])
