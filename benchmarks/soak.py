"""A server under everything at once: zipf traffic, reloads, bad loads, cancelled streams, engines killed. Every answer is checked.

    python -m benchmarks.soak --engine peft --seconds 1800 --adapters 64
    python -m benchmarks.soak --engine vllm --seconds 480 --kill-every 100000 --out benchmarks/results/soak-vllm-undisturbed.json

An answer is right when it equals what the adapter that the response names gives alone, in transformers + PEFT (vectors at cosine 0.9999
and nearer to no other adapter's; greedy tokens equal up to one whose lead is within 2 bf16 steps). These bounds are float32's, in which
all of it computes unless EMBEDFT_DTYPE says otherwise. The report goes to results/.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.demo import machine
from benchmarks.soaking import trouble
from benchmarks.soaking.report import Report, summary
from benchmarks.soaking.traffic import Client
from benchmarks.soaking.world import TASKS, World, make_world
from embedft.base import BaseSpec, base_folder

RESULTS = Path(__file__).parent / "results"


def soak(
    world: World, url: str, process: int, *, seconds: float, workers: int, kill_every: float, rest: float = 0.0, seed: int = 0
) -> Report:
    """Traffic and trouble against one running server until `seconds` are over. `process` is the gateway's.

    `rest`: seconds without new requests after each second of them; leaves cores to others, and no engine is less crowded for it.
    """
    report, until = Report(), time.monotonic() + seconds
    clients = [Client(world, url, report, until, random.Random(seed * 1000 + number), rest) for number in range(workers)]
    jobs: list[Callable[[], None]] = [client.run for client in clients]
    jobs += [
        lambda: trouble.reload(world, url, report, until),
        lambda: trouble.kill(process, report, until, every=kill_every),
        lambda: trouble.weigh(process, report, until),
    ]
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return report


def serve(world: World, *, engine: str, slots: int | None) -> Any:
    """`embedft serve` over the world, in a process of its own."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.serve.world import launch

    cache = {"kv_gib": 0.25} if engine == "vllm" else {}  # soon written to its end: what grows after that is no cache being filled
    settings = cache | {"engine": engine, "slots": slots}
    bases = [{"name": name, "model": str(folder), "task": TASKS[name], **settings} for name, folder in world.bases.items()]
    config = {"bases": bases, "access_log": False}
    server = launch(config, folder=world.folder, store=world.store.root, env={"EMBEDFT_ADMIN_TOKEN": "soak"})
    server.wait_ready(900)
    return server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("peft", "vllm"), default="peft")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--slots", type=int, help="adapters that one engine holds at a time; default: all of them")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=300)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("EMBEDFT_DTYPE", "float32")
    with tempfile.TemporaryDirectory(prefix="soak-") as home:
        embedding, language = base_folder(BaseSpec("minilm")), base_folder(BaseSpec("seed-lm"))
        world = make_world(Path(home), embedding=embedding, language=language, count=arguments.adapters)
        server = serve(world, engine=arguments.engine, slots=arguments.slots)
        report = soak(
            world, server.url, server.process.pid, seconds=arguments.seconds, workers=arguments.workers, kill_every=arguments.kill_every
        )
        told = {"engine": arguments.engine, "adapters": arguments.adapters, "slots": arguments.slots, "kill_every": arguments.kill_every}
        cores = len(os.sched_getaffinity(0))
        found = {**told, "cores_used": cores, "machine": machine(), **summary(report, seconds=arguments.seconds), "stopped": server.stop()}
    out = arguments.out or RESULTS / f"soak-{arguments.engine}.json"
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 1 if found["wrong"] or found["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
