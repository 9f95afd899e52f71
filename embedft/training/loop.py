"""Run a Trainer the way every trainer here runs: quiet, stoppable, resumable, measured."""

# ruff: noqa: ARG002 (transformers calls these with arguments of its choosing)
from pathlib import Path
from typing import Any

from embedft.recipe import TrainSection
from embedft.training.arguments import total_steps
from embedft.training.measure import DryRunReport, PeakMemory, Stopwatch, trainable
from embedft.training.run import Run


def fit(trainer: Any, run: Run, *, name: str, progress: bool) -> float:
    """Train to the end, from `run.checkpoint` if there is one; seconds spent. Of a run that had ended only its end is loaded.

    trainer: a transformers Trainer with AdapterCheckpoints mixed in. Raises TrainingInterrupted after a signal.
    """
    from transformers import PrinterCallback

    from embedft.training.interrupt import InterruptGuard
    from embedft.training.progress import ProgressETA

    if run.checkpoint and run.finished:
        _load_end(trainer, run.checkpoint)
        return 0.0
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressETA(name, enabled=progress))
    guard = InterruptGuard(run)
    trainer.add_callback(guard)
    with guard, Stopwatch() as watch:
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    guard.raise_if_stopped()
    return watch.seconds


def _load_end(trainer: Any, checkpoint: Path) -> None:
    """The trainer as it was after its last step: the weights, and what its method and its evaluations remember."""
    from transformers import TrainerState

    from embedft.training.best import BestCheckpoint
    from embedft.training.method_steps import MethodSteps

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, MethodSteps | BestCheckpoint):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control)


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
