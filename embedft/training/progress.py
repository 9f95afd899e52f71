"""One live line on stderr: step, loss, time left. A line every ten seconds where stderr is no terminal."""

# ruff: noqa: ARG002 (transformers calls these with arguments of its choosing)
import sys
import time
from typing import Any

from transformers import TrainerCallback


def note(text: str) -> None:
    """A line on stderr that is no error: stdout stays the result's."""
    sys.stderr.write(f"note: {text}\n")


class ProgressETA(TrainerCallback):
    """Reports a run's progress; `enabled=False` (as under --json) keeps silent."""

    every = 10.0

    def __init__(self, name: str, *, enabled: bool = True) -> None:
        self.name, self.enabled = name, enabled
        self._live = sys.stderr.isatty()
        self._loss: float | None = None
        self._began = self._printed = 0.0
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = self._printed = time.monotonic()
        self._first = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._loss = float(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        last = state.global_step >= state.max_steps
        if not self.enabled or not (self._live or last or now - self._printed >= self.every):
            return
        self._printed = now
        line = self.line(state.global_step, state.max_steps, now - self._began)
        start, end = ("\r\x1b[K", "\n" if last else "") if self._live else ("", "\n")
        sys.stderr.write(f"{start}{line}{end}")
        sys.stderr.flush()

    def line(self, step: int, steps: int, elapsed: float) -> str:
        """`name  step 12/100  loss 1.234  0:07 left`; the rate counts only steps of this process."""
        left = elapsed / max(1, step - self._first) * (steps - step)
        loss = "" if self._loss is None else f"  loss {self._loss:.3f}"
        return f"{self.name}  step {step}/{steps}{loss}  {int(left) // 60}:{int(left) % 60:02d} left"
