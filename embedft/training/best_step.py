"""The best step of a run by its loss on validation rows, and when to stop waiting for a better one. Knows no task."""

# ruff: noqa: ARG002 (transformers calls these with arguments of its choosing)
import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

FOLDER, RECORD = "best", "best.json"


class BestStep(TrainerCallback):
    """Keeps the tensors of the step with the least eval_loss in the run's folder and, at the end, puts them back.

    Neither stock trainer's way will do: on a quantized base both damage it. `trainer` has AdapterCheckpoints mixed in.
    Resumable: what was seen after the step resumed from is forgotten, and comes again.
    """

    def __init__(self, trainer: Any, folder: Path, *, patience: int | None) -> None:
        self._trainer, self._folder, self._patience = trainer, folder / FOLDER, patience
        self.losses: list[tuple[int, float]] = []

    @property
    def best(self) -> tuple[int, float] | None:
        return min(self.losses, key=lambda seen: seen[1], default=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        path = self._folder / RECORD
        seen = json.loads(path.read_text(encoding="utf-8")) if state.global_step and path.is_file() else []
        self.losses = [(int(step), float(loss)) for step, loss in seen if step <= state.global_step]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.losses.append((state.global_step, float(metrics["eval_loss"])))
        best = self.best
        assert best is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        if best[0] == state.global_step:
            self._trainer._save(str(self._folder))
        (self._folder / RECORD).write_text(json.dumps(self.losses), encoding="utf-8")
        waited = sum(step > best[0] for step, _ in self.losses)
        if self._patience and waited >= self._patience:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.best is not None and self.best[0] != state.global_step and not control.should_save:
            self._trainer._load_from_checkpoint(str(self._folder))
