"""What a run costs: peak memory, trainable parameters, seconds a step."""

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from embedft.steady import settle

if TYPE_CHECKING:
    from torch import nn


class PeakMemory:
    """Context manager; afterwards `.bytes` is the most memory that the block added.

    On CUDA torch's own count of allocated bytes (exact); elsewhere the growth of the process's resident set, sampled
    every 20 ms, so a shorter peak may be missed. What the process freed before and still held is given back first.
    """

    interval = 0.02

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._start = 0

    def __enter__(self) -> Self:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return self
        import psutil

        settle()
        process = psutil.Process()
        self._start = process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, args=(process,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            import torch

            self.bytes = torch.cuda.max_memory_allocated()
            return
        self._stop.set()
        self._thread.join()

    def _sample(self, process: "object") -> None:
        import psutil

        assert isinstance(process, psutil.Process)
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss - self._start)
            if self._stop.wait(self.interval):
                return


class TrackedMemory:
    """Context manager; afterwards `.bytes` is the most that torch's own allocator had handed out at once inside the block, exactly,
    each allocation and release counted. Slows the block; on CUDA use PeakMemory."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> Self:
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._profile.__exit__(*details)
        results: Any = self._profile.profiler.kineto_results  # pyright: ignore
        changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
        now = 0
        for _, change in sorted(changes, key=lambda change: change[0]):
            now += change
            self.bytes = max(self.bytes, now)


@dataclass(frozen=True)
class Trainable:
    """`percent` is of all parameters, a quantized weight counted by its elements, not its bytes."""

    count: int
    percent: float


def trainable(model: "nn.Module") -> Trainable:
    """Parameters that an optimizer would change, and their share of all parameters in %."""
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(_elements(parameter) for parameter in model.parameters())
    return Trainable(count, 100.0 * count / total)


def _elements(parameter: "nn.Parameter") -> int:
    """Logical elements: bitsandbytes packs two NF4 weights in a byte and keeps the true shape in its quant state."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


@dataclass(frozen=True)
class DryRunReport:
    """One real step (after one that warms up): what the whole run will need. Times in seconds."""

    name: str
    examples: int
    steps: int
    seconds_per_step: float
    seconds: float
    peak_bytes: int
    trainable: int
    trainable_percent: float


@dataclass(frozen=True)
class AdapterResult:
    """A finished run. `path` is the folder that PEFT loads; `metrics` as the passport holds them; `seconds` is training alone."""

    name: str
    path: str
    generation: str
    metrics: dict[str, object]
    seconds: float
    peak_bytes: int
    trainable: int

    def as_json(self) -> dict[str, object]:
        """The object that `--json` prints."""
        return {
            "adapter": self.name,
            "path": self.path,
            "generation": self.generation,
            "metrics": self.metrics,
            "seconds": round(self.seconds, 2),
            "peak_bytes": self.peak_bytes,
            "trainable": self.trainable,
        }


class Stopwatch:
    """Context manager; afterwards `.seconds` is the block's wall time."""

    seconds = 0.0

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
