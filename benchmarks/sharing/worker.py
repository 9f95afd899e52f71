"""One way of serving in a process of its own, driven by JSON lines: so that its memory is its own, and sides can alternate."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sharing.engine import PeftEngine
from benchmarks.sharing.ways import Peft, Vllm, Way
from benchmarks.sharing.workload import Request


def memory(way: Way) -> dict[str, int | None]:
    """Of the process that holds the model: resident, and proportional (a page shared by k processes counts 1/k)."""
    wanted, found = {"Rss": "rss", "Pss": "pss", "Pss_Anon": "pss_anon"}, dict[str, int | None]()
    for line in Path(f"/proc/{holder(way)}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        if name in wanted:
            found[wanted[name]] = int(value.split()[0]) * 1024
    return found | {"gpu": on_gpu(way)}


def on_gpu(way: Way) -> int | None:
    """Bytes that the holder has of the GPU: reserved by torch, or by the driver's list of processes; None where neither tells."""
    import torch

    if not torch.cuda.is_available():
        return None
    if not isinstance(way, PeftEngine):
        return torch.cuda.memory_reserved()
    asked = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    rows = [line.split(",") for line in subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines()]
    return next((int(mebibytes) << 20 for pid, mebibytes in rows if int(pid) == holder(way)), None)


def holder(way: Way) -> int:
    """The process that has the model and does the work."""
    return way.process.pid if isinstance(way, PeftEngine) else os.getpid()


def processor_seconds(way: Way) -> float:
    """Of all threads: on a shared machine it wavers less than the clock."""
    times = psutil.Process(holder(way)).cpu_times()
    return times.user + times.system


def main() -> None:
    """argv: way, mode, base folder, task, nf4 (0 or 1)."""
    kind, mode, base, task, nf4 = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    start = time.perf_counter()
    make = {"vllm": Vllm, "peft": Peft, "engine": PeftEngine}[kind]
    way: Way = make(mode, Path(base), task, **({"nf4": True} if nf4 == "1" and kind == "vllm" else {}))
    tell(answers, {"seconds": time.perf_counter() - start, **memory(way)})
    for line in sys.stdin:
        order = json.loads(line)
        start = time.perf_counter()
        if order["do"] == "register":
            way.register([Path(folder) for folder in order["folders"]])
            answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
        elif order["do"] == "memory":
            answer = memory(way)
        else:
            before = processor_seconds(way)
            times = way.run([Request(*request) for request in order["requests"]], flight=order["flight"], tokens=order["tokens"])
            answer = {"seconds": time.perf_counter() - start, "processor": processor_seconds(way) - before, "times": times}
        tell(answers, answer)
    if isinstance(way, PeftEngine):
        way.process.terminate()
        way.process.wait(30)


def tell(file: Any, answer: dict[str, Any]) -> None:
    file.write(json.dumps(answer) + "\n")
    file.flush()


if __name__ == "__main__":
    main()
