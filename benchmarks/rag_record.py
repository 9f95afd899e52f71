"""What the RAG benchmarks share: where their figures go, with the machine they were measured on, and the vectors they are measured over."""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedft.rag.engines import Rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rag.json"
K = 10


def record(part: str, figures: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "load_1min_at_end": os.getloadavg()[0], "python": platform.python_version()}
    known[part] = {**figures, "machine": machine}
    RESULTS.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{q}_ms": float(np.percentile(seconds, q)) * 1e3 for q in (50, 95)}


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def synthetic(rows: int, dimension: int = 384, *, seed: int = 7) -> Rows:
    """(rows, dimension) of length 1, in 1,000 clusters: neither as easy as noise nor as real as text."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((1000, dimension)).astype(np.float32)
    made = np.empty((rows, dimension), dtype=np.float32)
    for start in range(0, rows, 50_000):
        count = min(50_000, rows - start)
        block = centres[random.integers(1000, size=count)] + random.standard_normal((count, dimension), dtype=np.float32)
        made[start : start + count] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return made
