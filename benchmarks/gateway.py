"""What the gateway costs: the same engine asked directly (its Unix socket) and through the gateway, by turns, in one run.

    python benchmarks/gateway.py --engine peft

Embeddings of 1 and of 64 texts and a streamed chat of 16 tokens: latency of one client (p50), then throughput of 8 (median of turns).
The sides take turns, short ones, and each is first as often as the other: what else the machine does meets both.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.machine import machine
from embedft.adapters.store import AdapterStore

RESULTS = Path(__file__).parent / "results"
TEXTS = [f"how do I sort list number {number} in place without copying it" for number in range(64)]
TURN = [{"role": "user", "content": "def add(left, right)\nAdd two numbers.\nAnswer:"}]
KEY = "EMBEDFT_ENGINE_KEY"
Side = Callable[[], httpx.Client]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("peft", "vllm", "fake"), default="peft")
    parser.add_argument("--rounds", type=int, default=600, help="requests of one client, of each side")
    parser.add_argument("--turns", type=int, default=16, help="of eight clients, of each side")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.serve.world import launch

    with tempfile.TemporaryDirectory(prefix="gateway-") as home:
        bases = [
            {"name": "texts", "model": "minilm", "task": "embedding", "engine": arguments.engine},
            {"name": "words", "model": "seed-lm", "task": "causal_lm", "engine": arguments.engine},
        ]
        server = launch({"bases": bases, "limits": {"queue": 64}}, folder=Path(home), store=AdapterStore(Path(home) / "adapters").root)
        try:
            server.wait_ready(300)
            found = measure(server.url, server.process.pid, rounds=arguments.rounds, turns=arguments.turns, seconds=arguments.seconds)
        finally:
            server.stop()
    asked = {"rounds": arguments.rounds, "turns": arguments.turns, "seconds": arguments.seconds}
    report = {"engine": arguments.engine, "machine": machine(), **asked, "workloads": found}
    (RESULTS / f"gateway-{arguments.engine}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 0


def measure(url: str, process: int, *, rounds: int, turns: int, seconds: float) -> dict[str, Any]:
    """Per workload: p50 of either side and the difference in ms, requests a second of either and their ratio."""
    sides: dict[str, dict[str, Side]] = {
        task: {"direct": direct(process, task), "gateway": lambda: httpx.Client(base_url=url, timeout=120)}
        for task in ("embedding", "causal_lm")
    }
    workloads: dict[str, tuple[str, Callable[[httpx.Client, str], None]]] = {
        "embeddings of 1 text": ("embedding", lambda client, side: _embed(client, side, 1)),
        "embeddings of 64 texts": ("embedding", lambda client, side: _embed(client, side, 64)),
        "streamed chat": ("causal_lm", _chat),
    }
    return {name: _compare(sides[task], run, rounds=rounds, turns=turns, seconds=seconds) for name, (task, run) in workloads.items()}


def direct(process: int, task: str) -> Side:
    """A client of the engine itself, by the socket and the key that its own process was given."""
    for child in psutil.Process(process).children(recursive=True):
        line = child.cmdline()
        socket = next((line[place + 1] for place, part in enumerate(line[:-1]) if part in ("--socket", "--uds")), None)
        embeds = "embedding" in line or "pooling" in line
        if socket and "guard.py" not in " ".join(line[:5]) and embeds == (task == "embedding"):
            headers = {"authorization": f"Bearer {child.environ()[KEY]}"}
            path = socket
            return lambda: httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://engine", headers=headers, timeout=120)
    raise LookupError(f"no engine process for {task}")


def _compare(
    sides: dict[str, Side], run: Callable[[httpx.Client, str], None], *, rounds: int, turns: int, seconds: float
) -> dict[str, float]:
    times: dict[str, list[float]] = {side: [] for side in sides}
    clients = {side: make() for side, make in sides.items()}
    for turn in range(rounds + 3):
        for side in _order(sides, turn):
            began = time.perf_counter()
            run(clients[side], side)
            if turn >= 3:
                times[side].append((time.perf_counter() - began) * 1000)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(turns):
        for side in _order(sides, turn):
            rates[side].append(_rate(sides[side], side, run, seconds=seconds))
    p50 = {side: statistics.median(values) for side, values in times.items()}
    rate = {side: statistics.median(values) for side, values in rates.items()}
    return {
        "direct_p50_ms": round(p50["direct"], 2),
        "gateway_p50_ms": round(p50["gateway"], 2),
        "added_ms": round(p50["gateway"] - p50["direct"], 2),
        "direct_per_s": round(rate["direct"], 2),
        "gateway_per_s": round(rate["gateway"], 2),
        "throughput_ratio": round(rate["gateway"] / rate["direct"], 3),
    }


def _order(sides: dict[str, Side], turn: int) -> list[str]:
    return list(sides) if turn % 2 else list(reversed(sides))


def _rate(make: Side, side: str, run: Callable[[httpx.Client, str], None], *, seconds: float) -> float:
    until = time.perf_counter() + seconds

    def one(_: int) -> int:
        count = 0
        with make() as client:
            while time.perf_counter() < until:
                run(client, side)
                count += 1
        return count

    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        total = sum(pool.map(one, range(8)))
    return total / (time.perf_counter() - began)


def _embed(client: httpx.Client, side: str, count: int) -> None:
    body = {"model": "base" if side == "direct" else "texts", "input": TEXTS[:count], "encoding_format": "base64"}
    client.post("/v1/embeddings", json=body).raise_for_status()


def _chat(client: httpx.Client, side: str) -> None:
    body = {"model": "base" if side == "direct" else "words", "messages": TURN, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]", lines[-1]


if __name__ == "__main__":
    sys.exit(main())
