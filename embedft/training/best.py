"""The best weights of a run by a metric, kept on disk as they appear, and an end to a run that gets no better.

What is read back is the adapter alone: reloading a whole model, as both stock trainers do, damages a quantized base. Exact resume holds:
what was measured after the checkpoint is forgotten, and measured again. Knows no task.
"""

# ruff: noqa: ARG002 (transformers calls these with arguments of its choosing)
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from embedft.errors import AdapterInvalid
from embedft.files import write_text
from embedft.training.progress import note


class BestCheckpoint(TrainerCallback):
    """`evaluate` gives the metric, which people know as `metric`; more is better. `history` is [step, score] of every evaluation, in order.

    What is not finite is worst. `trainer` has AdapterCheckpoints mixed in. The run ends after `patience` evaluations without a better one.
    """

    def __init__(self, trainer: Any, folder: Path, evaluate: Callable[[], float], *, metric: str, every: int, patience: int | None) -> None:
        self._trainer, self.folder, self.evaluate, self.every, self.patience = trainer, folder / "best", evaluate, every, patience
        self.metric = metric
        trainer.add_callback(self)
        self.history: list[tuple[int, float]] = []

    @property
    def best(self) -> tuple[int, float]:
        """The first step that reached the highest score."""
        return max(self.history, key=lambda entry: (_counted(entry[1]), -entry[0]))

    @property
    def _hopeless(self) -> bool:
        """`patience` evaluations have gone by without a better one."""
        if self.patience is None or not self.history:
            return False
        return sum(step > self.best[0] for step, _ in self.history) >= self.patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        path = self.folder / "history.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        self.history = [(step, score) for step, score in known if step <= state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._hopeless:  # resumed at its very end
            control.should_training_stop = True
            return
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        score = self.evaluate()
        if math.isfinite(score) and (not self.history or score > _counted(self.best[1])):
            self._trainer._save(str(self.folder))
        self.history.append((state.global_step, score))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "history.json", json.dumps(self.history))
        if self._hopeless:
            control.should_training_stop = True

    def restore(self, *, name: str) -> dict[str, Any]:
        """Put the best weights into the trainer's model; what the passport tells of it. AdapterInvalid where no score was finite."""
        step, score = self.best
        if not math.isfinite(score):
            reason = f"none of its {len(self.history)} evaluations gave a finite score: its training diverged (lower train.lr)"
            raise AdapterInvalid(name, reason)
        self._trainer._load_from_checkpoint(str(self.folder))
        note(f"{name}: the best of {len(self.history)} evaluations was at step {step}: {self.metric} {score:.4f}")
        return {"step": step, "score": score, "history": [list(entry) for entry in self.history]}


def _counted(score: float) -> float:
    return score if math.isfinite(score) else -math.inf
