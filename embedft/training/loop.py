"""Run a Trainer the way every trainer here runs: quiet, stoppable, resumable, measured."""

# ruff: noqa: ARG002 (transformers calls these with arguments of its choosing)
from typing import Any

from embedft.recipe import TrainSection
from embedft.training.arguments import total_steps
from embedft.training.measure import DryRunReport, PeakMemory, Stopwatch, trainable
from embedft.training.run import Run


def fit(trainer: Any, run: Run, *, name: str, progress: bool) -> float:
    """Train to the end, from `run.checkpoint` if there is one; seconds spent.

    trainer: a transformers Trainer with AdapterCheckpoints mixed in. Raises TrainingInterrupted after a signal.
    """
    from transformers import PrinterCallback

    from embedft.training.interrupt import InterruptGuard
    from embedft.training.progress import ProgressETA

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressETA(name, enabled=progress))
    guard = InterruptGuard(run)
    trainer.add_callback(guard)
    with guard, Stopwatch() as watch:
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    guard.raise_if_stopped()
    return watch.seconds


def rehearse(trainer: Any, train: TrainSection, *, name: str, examples: int, steps_per_epoch: int) -> DryRunReport:
    """Two real steps, the second one timed: what `--dry-run` reports. The trainer's arguments must have max_steps=2."""
    from transformers import PrinterCallback, TrainerCallback

    class _SecondStep(TrainerCallback):
        watch = Stopwatch()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.watch.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.watch.__exit__()

    timer = _SecondStep()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(timer)
    with PeakMemory() as peak:
        trainer.train()
    size, steps = trainable(trainer.model), total_steps(train, steps_per_epoch)
    seconds = timer.watch.seconds
    return DryRunReport(name, examples, steps, seconds, seconds * steps, peak.bytes, size.count, size.percent)
