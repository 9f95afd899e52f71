"""One causal-LM recipe → one proven adapter: read, attach, fit, evaluate, publish."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.base import Base, BaseSpec, load_base
from embedft.causal_lm.data import Row, data_hash, read_rows
from embedft.causal_lm.evaluate import Generation, check_embedded, compare, evaluate_generation, pad_token, tell_of_cuts
from embedft.causal_lm.template import Example, Template, template_of
from embedft.errors import BaseError, DataError
from embedft.methods import attach, supported, text_positions
from embedft.methods.targets import fused_experts
from embedft.recipe import CausalLMRecipe, CausalLMTrain
from embedft.records import sample
from embedft.training.arguments import hf_arguments, steps_an_epoch
from embedft.training.loop import fit, rehearse
from embedft.training.measure import AdapterResult, DryRunReport, PeakMemory
from embedft.training.progress import note
from embedft.training.publish import Published, publish
from embedft.training.run import open_run
from embedft.training.together import check_together
from embedft.training.trackers import tracked

if TYPE_CHECKING:
    from embedft.adapters.store import AdapterStore
    from embedft.training.best import BestCheckpoint

START_BATCHES = 8  # what EVA's first vectors are computed from


@dataclass(frozen=True)
class Split:
    """The rows a run learns from, those it is judged by (empty: no evaluation) and those that say when to stop."""

    train: list[Row]
    test: list[Row]
    validation: list[Row] = field(default_factory=list[Row])

    @property
    def hash(self) -> str:
        return data_hash(self.train, self.test, *([self.validation] if self.validation else []))


def train(
    recipe: CausalLMRecipe, *, store: "AdapterStore", resume: bool = False, dry_run: bool = False, progress: bool = True
) -> AdapterResult | DryRunReport:
    """Train, judge against the base and publish under `recipe.name`; with `dry_run` take two steps and report their cost.

    Raises DataError (bad rows, before any model loads), MethodUnsupported, ResumeRefused, TrainingInterrupted (after a signal),
    or what loading the base raises. The base's tensors never change.
    """
    check_together(recipe)
    split = read_split(recipe)
    spec = BaseSpec(recipe.base.model, recipe.base.quantization, recipe.base.revision)
    with PeakMemory() as peak:
        base = load_base(spec, task="causal_lm")
        recipe = within(recipe, base.info.positions)
        template = template_of(base.tokenizer, recipe.data.template)
        examples = tokenized(split.train, template, recipe)
        check_embedded(base.model, base.tokenizer, (example.ids for example in examples))
        _tell_of_shared(split, recipe.name)
        supported(recipe.adapter, task="causal_lm", info=base.info)  # all that may be refused, before anything is scored
        check_packing(base.model, recipe.train)
        if dry_run:
            report = _dry_run(base, examples, recipe)
            return replace(report, peak_bytes=max(report.peak_bytes, peak.bytes))
        held_out = tokenized(split.validation, template, recipe) if split.validation else []
        limits = {"max_new_tokens": recipe.eval.max_new_tokens, "max_length": recipe.train.max_length}
        tell_of_cuts(base.model, template, split.test, recipe.name, **limits)
        run = open_run(recipe, root=Path(store.root), data_hash=split.hash, base_fingerprint=base.info.fingerprint, resume=resume)
        with tracked(recipe.train.trackers, name=recipe.name) as tell:
            before = _evaluate(base.model, template, split.test, recipe)
            model = _seeded_adapter(base, examples, recipe)
            trainer = build_trainer(model, base, examples, recipe.train, folder=run.folder, validation=held_out)
            best = best_checkpoint(trainer, recipe.train, folder=run.folder) if held_out else None
            seconds = fit(trainer, run, name=recipe.name, progress=progress)
            chosen = {"best": best.restore(name=recipe.name)} if best else {}
            after = _evaluate(model, template, split.test, recipe)
            compared = compare(before, after, recipe.eval.metric)
            tell({f"{way}/{name}": value for way in ("base", "adapter") for name, value in compared.get(way, {}).items()})
    with run.ending():
        return publish(
            model,
            base,
            recipe,
            store=store,
            published=Published(
                metrics=compared | chosen,
                data_hash=split.hash,
                max_length=recipe.train.max_length,
                template_hash=template.hash,
                rows=eval_rows(split.test, before, after, keep_texts=recipe.eval.keep_texts),
                seconds=seconds,
                peak_bytes=peak.bytes,
            ),
        )


def read_split(recipe: CausalLMRecipe) -> Split:
    """All files' rows; DataError with the faults of all at once."""
    problems: list[str] = []
    parts: list[list[Row]] = [[], [], []]
    given = [(recipe.data.train, recipe.data.limit), (recipe.data.eval, None), (recipe.data.validation, None)]
    for number, (source, limit) in enumerate(given):
        if source is None:
            continue
        try:
            parts[number] = read_rows(source, format=recipe.data.format, limit=limit)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    train, held_out, validation = parts
    return Split(train, sample(held_out, recipe.eval.rows, key=lambda row: row.id), validation)


def _tell_of_shared(split: Split, name: str) -> None:
    """Say how many rows that judge were learnt, or judged before: a figure of those is none of held-out rows."""
    learnt, chosen = ({row.messages for row in rows} for rows in (split.train, split.validation))
    for rows, judges, others, place in (
        (split.test, "data.eval", learnt, "data.train"),
        (split.test, "data.eval", chosen, "data.validation"),
        (split.validation, "data.validation", learnt, "data.train"),
    ):
        if shared := sum(row.messages in others for row in rows):
            note(f"{name}: {shared} of {len(rows)} rows of {judges} are in {place} too: they say nothing of rows that it has not seen")


def within(recipe: CausalLMRecipe, positions: int) -> CausalLMRecipe:
    """The recipe with rows no longer than its base can place; where more was asked for, that is told of. MethodUnsupported where
    virtual tokens leave no room for any."""
    asked, left = recipe.train.max_length, text_positions(recipe.adapter, positions)
    if asked <= left:
        return recipe
    if "max_length" in recipe.train.model_fields_set:
        virtual = f", {positions - left} of them for virtual tokens" if left < positions else ""
        note(f"{recipe.name}: the base has {positions} positions{virtual}; train.max_length={asked} is cut")
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_length": left})})


def tokenized(rows: Sequence[Row], template: Template, recipe: CausalLMRecipe) -> list[Example]:
    """Examples of the rows whose answer begins within max_length; the others are told of, and those of which not all is learnt.
    DataError if the others are more than one in ten."""
    made: list[Example | None] = []
    problems: list[str] = []
    for row in rows:
        try:
            made.append(template.example(row, max_length=recipe.train.max_length, train_on_inputs=recipe.data.train_on_inputs))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    kept = [example for example in made if example is not None]
    if lost := len(rows) - len(kept):
        fault = f"{lost} of {len(rows)} prompts fill all {recipe.train.max_length} tokens and leave no answer"
        if lost > 0.1 * len(rows):
            raise DataError([f"{fault}: raise train.max_length"])
        note(f"{recipe.name}: {fault}: those rows are left out, unless you raise train.max_length")
    if cut := sum(example.cut > 0 for example in kept):
        fault = f"{cut} of {len(rows)} rows are cut at {recipe.train.max_length} tokens"
        note(f"{recipe.name}: {fault}: how their answers end is not learnt, unless you raise train.max_length")
    if rewritten := sum(example.rewritten > 0 for example in kept):
        fault = f"the template writes earlier answers of {rewritten} of {len(rows)} rows otherwise than it asked for them"
        note(f"{recipe.name}: {fault}: of those rows the last answer alone is learnt; make each answer the end of a row of its own")
    return kept


def build_trainer(
    model: Any, base: Base, examples: list[Example], settings: CausalLMTrain, *, folder: Path, validation: Sequence[Example] = ()
) -> Any:
    """transformers' Trainer with our checkpoints, batches and data order; `validation` is what its `evaluate` takes the loss of."""
    from transformers import Trainer, TrainingArguments

    from embedft.causal_lm.attention import install
    from embedft.causal_lm.batches import Collate, LengthGrouped, PackedCollate, in_passes, pack
    from embedft.training.interrupt import AdapterCheckpoints

    rows: list[Any] = list(examples)
    held_out: list[Any] = list(validation)
    collate: Any = Collate(pad_token(base.tokenizer), base.model.dtype)
    install()
    if settings.packing:
        rows, held_out = (pack(part, length=settings.max_length) for part in (rows, held_out))
        collate = PackedCollate(pad_token(base.tokenizer), base.model.dtype)

    class LmTrainer(AdapterCheckpoints, Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:  # noqa: ARG002
            return LengthGrouped([len(row.ids) for row in rows], batch=settings.batch, seed=settings.seed)

    parted = in_passes(settings)
    common = hf_arguments(parted, output_dir=folder, steps_per_epoch=steps_an_epoch(len(rows), parted))
    common |= {"prediction_loss_only": True, "per_device_eval_batch_size": parted.batch}
    if settings.gradient_checkpointing:
        common |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(**common, remove_unused_columns=False, use_cache=False)
    data: Any = {"train_dataset": rows, "eval_dataset": held_out or None}
    return LmTrainer(model=model, args=arguments, data_collator=collate, **data)


def best_checkpoint(trainer: Any, settings: CausalLMTrain, *, folder: Path) -> "BestCheckpoint":
    """Let the trainer take the loss of the validation rows as it goes, and keep the weights where it is least."""
    from embedft.training.best import BestCheckpoint

    def evaluate() -> float:
        return -float(trainer.evaluate()["eval_loss"])

    assert settings.evaluate_every is not None
    metric = "minus the loss on data.validation,"
    return BestCheckpoint(trainer, folder, evaluate, metric=metric, every=settings.evaluate_every, patience=settings.patience)


def check_packing(model: Any, settings: CausalLMTrain, *, weights: bool = True) -> None:
    """Raises BaseError where the base (`model`), with or without its weights, would see past an example."""
    from embedft.causal_lm.batches import packing_fault

    if settings.packing and (fault := packing_fault(model, length=settings.max_length, weights=weights)):
        raise BaseError(f"examples cannot be packed on {type(model).__name__}: {fault}: set train.packing=false")


def _seeded_adapter(base: Base, examples: Sequence[Example], recipe: CausalLMRecipe) -> Any:
    """The new adapter; a method that begins from data sees the first few batches of a seeded shuffle."""
    import torch

    from embedft.causal_lm.batches import Collate

    torch.manual_seed(recipe.train.seed)
    collate, size = Collate(pad_token(base.tokenizer), base.model.dtype), recipe.train.batch
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(recipe.train.seed)).tolist()
    starts = range(0, min(len(order), size * START_BATCHES), size)
    batches = [collate([examples[i] for i in order[start : start + size]]) for start in starts]
    if recipe.adapter.method != "full" and (share := fused_experts(base.model)):
        packed = base.info.quantization
        told = "the adapter leaves them as they are" + ("" if packed == "none" else f", and {packed} in full precision")
        note(f"{recipe.name}: {share:.0%} of the base's weights are its experts', in no linear layers: {told}")
    return attach(base, recipe.adapter, task="causal_lm", batches=batches)


def _dry_run(base: Base, examples: list[Example], recipe: CausalLMRecipe) -> DryRunReport:
    import tempfile

    model = _seeded_adapter(base, examples, recipe)
    settings = recipe.train.model_copy(update={"max_steps": 2, "checkpoint_every": None, "trackers": ()})
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(model, base, examples, settings, folder=Path(folder))
        steps = steps_an_epoch(len(examples), recipe.train)
        return rehearse(trainer, recipe.train, name=recipe.name, examples=len(examples), steps_per_epoch=steps)


def _evaluate(model: Any, template: Template, rows: list[Row], recipe: CausalLMRecipe) -> Generation | None:
    if not rows:
        return None
    model.eval()
    settings = recipe.eval
    return evaluate_generation(
        model,
        template,
        rows,
        max_new_tokens=settings.max_new_tokens,
        metric=settings.metric,
        batch=settings.batch,
        max_length=recipe.train.max_length,
    )


def eval_rows(rows: Sequence[Row], base: Generation | None, adapter: Generation | None, *, keep_texts: bool) -> list[dict[str, Any]]:
    """One record a row: id and both scores; the texts only when asked."""
    if base is None or adapter is None:
        return []
    records: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        record: dict[str, Any] = {"id": row.id}
        for name, made in (("base", base), ("adapter", adapter)):
            record[name] = {metric: round(float(values[i]), 6) for metric, values in made.scores.items()}
        if keep_texts:
            record["texts"] = {"expected": row.answer, "base": base.answers[i], "adapter": adapter.answers[i]}
        records.append(record)
    return records
