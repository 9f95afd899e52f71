"""What happened in a soak: counted from many threads, told in plain figures."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SETTLED = 30.0  # seconds after an engine's start: until then it is still loading


@dataclass
class Report:
    """`memory`: (time, bytes of the gateway, bytes of all, whether every engine had settled)."""

    sent: int = 0
    answered: int = 0
    cancelled: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int, int, bool]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str, **parts: Any) -> None:
        """One thing done; `answered`, `cancelled`, `refused` (a code), `wrong` and `lost` say how it went."""
        with self.lock:
            self.done[kind] += 1
            self.answered += parts.get("answered", 0)
            self.cancelled += parts.get("cancelled", 0)
            if parts.get("refused"):
                self.refused[parts["refused"]] += 1
            self.wrong += parts.get("wrong", [])
            self.lost += parts.get("lost", [])

    def send(self) -> None:
        with self.lock:
            self.sent += 1

    @property
    def unaccounted(self) -> int:
        """Requests of which nobody knows what became of them: their thread ended under them."""
        return self.sent - self.answered - self.cancelled - sum(self.refused.values()) - len(self.lost)


def summary(report: Report, *, seconds: float) -> dict[str, Any]:
    """Slopes are of a straight line through the run's last two thirds; that of all processes only where no engine had just started."""
    points = report.memory[len(report.memory) // 3 :]
    settled = [(at, everything) for at, _, everything, steady in points if steady]
    return {
        "seconds": seconds,
        "sent": report.sent,
        "answered": report.answered,
        "cancelled": report.cancelled,
        "refused": dict(report.refused),
        "wrong": len(report.wrong),
        "lost": len(report.lost) + report.unaccounted,
        "done": dict(sorted(report.done.items())),
        "memory_mib": round(points[-1][2] / 2**20) if points else None,
        "gateway_mib": round(points[-1][1] / 2**20) if points else None,
        "memory_mib_by_minute": _by_minute(report.memory),
        "memory_slope_mib_a_minute": _slope(settled),
        "gateway_slope_mib_a_minute": _slope([(at, gateway) for at, gateway, _, _ in points]),
        "examples": [*_one_of_each(report.wrong)[:5], *report.lost[:5]],
    }


def _one_of_each(wrong: list[str]) -> list[str]:
    """The first of each adapter's (or of whatever else stands before the colon)."""
    return list({text.partition(":")[0]: text for text in reversed(wrong)}.values())[::-1]


def _by_minute(points: list[tuple[float, int, int, bool]]) -> list[int]:
    """The median of all processes' memory in each minute: an engine that was killed and is loading again shows as a dip."""
    minutes: dict[int, list[int]] = {}
    for at, _, everything, _ in points:
        minutes.setdefault(int((at - points[0][0]) // 60), []).append(everything)
    return [round(float(np.median(sizes)) / 2**20) for sizes in minutes.values()]


def _slope(points: list[tuple[float, int]]) -> float | None:
    if len(points) < 10:
        return None
    at, size = np.array(points, dtype=np.float64).T
    return round(float(np.polyfit(at - at[0], size, 1)[0]) * 60 / 2**20, 2)
