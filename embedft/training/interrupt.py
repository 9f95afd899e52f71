"""Stop and go on exactly: checkpoints of what trains, and of nothing else.

A checkpoint holds the trainable tensors (and a method's frozen pairs and counters), the optimizer, the schedule, the random
states and the position in the data.
The base is never written and never read back: both stock trainers damage a quantized base there: an int8 one is
overwritten without a word, an NF4 one keeps the last weights or fails.
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
from embedft.methods.companion import FROZEN, add_companion, drop_companion
from embedft.steady import steady
from embedft.training.method_steps import MethodSteps, adapted_model, method_steps
from embedft.training.optimizers import method_optimizer
from embedft.training.run import COMPLETE, FINISHED, Run, last_checkpoint

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "trainable.safetensors"
METHOD = "method.safetensors"  # what the method must remember beside its parameters


def save_trainable(model: "nn.Module", folder: Path) -> None:
    """Write every tensor that requires a gradient, and a method's frozen pairs, under its parameter name, in its own dtype."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in _kept(model).items()}, folder / WEIGHTS)


def load_trainable(model: "nn.Module", folder: Path) -> None:
    """Copy a checkpoint's tensors into the model in place. Raises KeyError if the sets of names differ."""
    import torch
    from safetensors.torch import load_file

    saved = load_file(folder / WEIGHTS)
    ranks = [value.shape[0] for name, value in saved.items() if name.endswith(f"lora_A.{FROZEN}.weight")]
    if ranks:
        add_companion(adapted_model(model), ranks[0])
    elif (adapted := adapted_model(model)) is not None:
        drop_companion(adapted)  # the checkpoint is older than the pair
    current = _kept(model)
    if saved.keys() != current.keys():
        raise KeyError(f"the checkpoint's tensors are not this adapter's: {sorted(saved.keys() ^ current.keys())[:4]}")
    with torch.no_grad():
        for name, value in current.items():
            value.copy_(saved[name])


def _kept(model: "nn.Module") -> dict[str, "nn.Parameter"]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad or f".{FROZEN}." in name}


class AdapterCheckpoints:
    """Mixed in before a transformers Trainer class: its checkpoints hold the adapter alone, and are whole or ignored.

    The adapter's method gets what it needs of the loop here: its optimizer, and its part between two steps.
    """

    model: Any
    args: Any
    state: Any
    control: Any
    optimizer: Any
    callback_handler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method_steps: MethodSteps | None = method_steps(self.model)
        if self.method_steps is not None:
            self.add_callback(self.method_steps)  # type: ignore[attr-defined]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with steady():
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            self.optimizer = method_optimizer(self.model, self.args)
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        from safetensors.torch import save_file

        folder = Path(output_dir or self.args.output_dir)
        save_trainable(self.model, folder)
        if self.method_steps is not None:
            save_file({name: value.detach().cpu().contiguous() for name, value in self.method_steps.state().items()}, folder / METHOD)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        from safetensors.torch import load_file

        load_trainable(self.model, Path(resume_from_checkpoint))
        if self.method_steps is not None:
            device = next(self.model.parameters()).device
            self.method_steps.restore(load_file(Path(resume_from_checkpoint) / METHOD, device=str(device)))

    def _save_checkpoint(self, model: object, trial: object) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        folder = Path(self.args.output_dir)
        done = folder / f"checkpoint-{self.state.global_step}"
        if self._ended():
            (done / FINISHED).touch()
        for path in done.iterdir():
            _fsync(path)
        (done / COMPLETE).touch()
        _fsync(done)
        for old in folder.glob("checkpoint-*"):
            if old != done:
                shutil.rmtree(old, ignore_errors=True)

    def _ended(self) -> bool:
        """This is the run's last step, and no signal made it so."""
        guards = [each for each in self.callback_handler.callbacks if isinstance(each, InterruptGuard)]
        return self.control.should_training_stop and not any(guard.stopped for guard in guards)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class InterruptGuard(TrainerCallback):
    """While entered, the first SIGINT or SIGTERM ends the run after the current step, with a checkpoint; a second one at once.
    The last step is kept as well: whatever goes wrong after it, no training is lost.

    `raise_if_stopped()` after `Trainer.train` turns that into TrainingInterrupted. In a thread other than the main one
    (where Python allows no signal handlers) it does nothing until `stop()` is called.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._asked = self.stopped = False
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
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if self._asked and not ends:
            self.stopped = control.should_training_stop = True
        if self.stopped or ends:
            control.should_save = True

    def raise_if_stopped(self) -> None:
        if self.stopped:
            raise TrainingInterrupted(str(last_checkpoint(self._run.folder)), self._run.command)
