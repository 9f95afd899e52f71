"""Stop and go on exactly: checkpoints of what trains, and of nothing else.

A checkpoint holds the trainable tensors, the optimizer, the schedule, the random states and the position in the data.
The base is never written and never read back: both stock trainers damage a quantized base there (FACTS.md, defects 1 and 2).
"""

# ruff: noqa: ARG002 (transformers calls these with arguments of its choosing)
import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from transformers import TrainerCallback

from embedft.errors import TrainingInterrupted
from embedft.training.run import COMPLETE, Run, last_checkpoint

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "trainable.safetensors"


def save_trainable(model: "nn.Module", folder: Path) -> None:
    """Write every tensor that requires a gradient, under its parameter name, in its own dtype."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.named_parameters() if value.requires_grad}
    save_file(tensors, folder / WEIGHTS)


def load_trainable(model: "nn.Module", folder: Path) -> None:
    """Copy a checkpoint's tensors into the model in place. Raises KeyError if the sets of names differ."""
    import torch
    from safetensors.torch import load_file

    saved = load_file(folder / WEIGHTS)
    current = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if saved.keys() != current.keys():
        raise KeyError(f"the checkpoint's tensors are not this adapter's: {sorted(saved.keys() ^ current.keys())[:4]}")
    with torch.no_grad():
        for name, value in current.items():
            value.copy_(saved[name])


class AdapterCheckpoints:
    """Mixed in before a transformers Trainer class: its checkpoints hold the adapter alone, and are whole or ignored."""

    model: Any
    args: Any
    state: Any

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        save_trainable(self.model, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        load_trainable(self.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: object, trial: object) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        folder = Path(self.args.output_dir)
        done = folder / f"checkpoint-{self.state.global_step}"
        for path in done.iterdir():
            _fsync(path)
        (done / COMPLETE).touch()
        _fsync(done)
        for old in folder.glob("checkpoint-*"):
            if old != done:
                shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class InterruptGuard(TrainerCallback):
    """While entered, the first SIGINT or SIGTERM ends the run after the current step, with a checkpoint; a second one at once.

    `raise_if_stopped()` after `Trainer.train` turns that into TrainingInterrupted. In a thread other than the main one
    (where Python allows no signal handlers) it does nothing until `stop()` is called.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._asked = self._stopped = False
        self._before: dict[int, Any] = {}

    def stop(self) -> None:
        self._asked = True

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._asked and state.global_step < state.max_steps:
            self._stopped = True
            control.should_save = control.should_training_stop = True

    def raise_if_stopped(self) -> None:
        if self._stopped:
            raise TrainingInterrupted(str(last_checkpoint(self._run.folder)), self._run.command)
