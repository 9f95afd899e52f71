"""One causal-LM recipe → one proven adapter: read, attach, fit, evaluate, publish."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.base import Base, BaseSpec, load_base
from embedft.causal_lm.data import Row, data_hash, read_rows
from embedft.causal_lm.evaluate import Generation, compare, evaluate_generation, pad_token
from embedft.causal_lm.template import Example, Template, template_of
from embedft.errors import DataError
from embedft.methods import attach
from embedft.recipe import CausalLMRecipe, CausalLMTrain
from embedft.training.arguments import hf_arguments, steps_an_epoch
from embedft.training.loop import fit, rehearse
from embedft.training.measure import AdapterResult, DryRunReport, PeakMemory
from embedft.training.publish import Published, publish
from embedft.training.run import open_run

if TYPE_CHECKING:
    from embedft.adapters.store import AdapterStore


@dataclass(frozen=True)
class Split:
    """The rows a run learns from and those it is judged by (empty: no evaluation)."""

    train: list[Row]
    test: list[Row]

    @property
    def hash(self) -> str:
        return data_hash(self.train, self.test)


def train(
    recipe: CausalLMRecipe, *, store: "AdapterStore", resume: bool = False, dry_run: bool = False, progress: bool = True
) -> AdapterResult | DryRunReport:
    """Train, judge against the base and publish under `recipe.name`; with `dry_run` take two steps and report their cost.

    Raises DataError (bad rows, before any model loads), ResumeRefused, TrainingInterrupted (after a signal), or what
    loading the base raises. The base's tensors never change.
    """
    split = read_split(recipe)
    spec = BaseSpec(recipe.base.model, recipe.base.quantization, recipe.base.revision)
    with PeakMemory() as peak:
        base = load_base(spec, task="causal_lm")
        template = template_of(base.tokenizer, recipe.data.template)
        examples = tokenized(split.train, template, recipe)
        if dry_run:
            report = _dry_run(base, examples, recipe)
            return replace(report, peak_bytes=max(report.peak_bytes, peak.bytes))
        run = open_run(recipe, root=Path(store.root), data_hash=split.hash, base_fingerprint=base.info.fingerprint, resume=resume)
        before = _evaluate(base.model, template, split.test, recipe)
        model = _seeded_adapter(base, recipe)
        trainer = build_trainer(model, base, examples, recipe.train, folder=run.folder)
        seconds = fit(trainer, run, name=recipe.name, progress=progress)
        after = _evaluate(model, template, split.test, recipe)
    result = publish(
        model,
        base,
        recipe,
        store=store,
        published=Published(
            metrics=compare(before, after, recipe.eval.metric),
            data_hash=split.hash,
            max_length=recipe.train.max_length,
            template_hash=template.hash,
            rows=eval_rows(split.test, before, after, keep_texts=recipe.eval.keep_texts),
            seconds=seconds,
            peak_bytes=peak.bytes,
        ),
    )
    run.discard()
    return result


def read_split(recipe: CausalLMRecipe) -> Split:
    """Both files' rows; DataError with the faults of both at once."""
    problems: list[str] = []
    parts: list[list[Row]] = [[], []]
    given = [(recipe.data.train, recipe.data.limit), (recipe.data.eval, recipe.eval.rows)]
    for number, (source, limit) in enumerate(given):
        if source is None:
            continue
        try:
            parts[number] = read_rows(source, format=recipe.data.format, limit=limit)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return Split(*parts)


def tokenized(rows: Sequence[Row], template: Template, recipe: CausalLMRecipe) -> list[Example]:
    """Examples of the rows whose answer begins within max_length. DataError if that is fewer than nine in ten."""
    made = [template.example(row, max_length=recipe.train.max_length, train_on_inputs=recipe.data.train_on_inputs) for row in rows]
    kept = [example for example in made if example is not None]
    if len(kept) < 0.9 * len(rows):
        limit = recipe.train.max_length
        raise DataError(
            [f"{len(rows) - len(kept)} of {len(rows)} prompts fill all {limit} tokens and leave no answer: raise train.max_length"]
        )
    return kept


def build_trainer(model: Any, base: Base, examples: list[Example], settings: CausalLMTrain, *, folder: Path) -> Any:
    """transformers' Trainer with our checkpoints, batches and data order."""
    from transformers import Trainer, TrainingArguments

    from embedft.causal_lm.batches import Collate, LengthGrouped
    from embedft.training.interrupt import AdapterCheckpoints

    class LmTrainer(AdapterCheckpoints, Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:  # noqa: ARG002
            lengths = [len(example.ids) for example in examples]
            return LengthGrouped(lengths, batch=settings.batch, seed=settings.seed)

    steps = steps_an_epoch(len(examples), settings)
    arguments = TrainingArguments(
        **hf_arguments(settings, output_dir=folder, steps_per_epoch=steps), remove_unused_columns=False, use_cache=False
    )
    dataset: Any = examples
    return LmTrainer(model=model, args=arguments, train_dataset=dataset, data_collator=Collate(pad_token(base.tokenizer)))


def _seeded_adapter(base: Base, recipe: CausalLMRecipe) -> Any:
    import torch

    torch.manual_seed(recipe.train.seed)
    return attach(base, recipe.adapter, task="causal_lm")


def _dry_run(base: Base, examples: list[Example], recipe: CausalLMRecipe) -> DryRunReport:
    import tempfile

    model = _seeded_adapter(base, recipe)
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
        model, template, rows, max_new_tokens=settings.max_new_tokens, batch=settings.batch, max_length=recipe.train.max_length
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
