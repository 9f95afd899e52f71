"""Attention over packed texts, forward and backward: attention.c beside torch's flash kernels called once for every length.

    python benchmarks/packed_attention.py       # writes benchmarks/results/packed_attention.json

MiniLM's shapes (12 heads of 32), 32 queries and 32 documents; the documents' lengths are spread over the quarter below `longest`.
The two take turns; each figure is the median of its turns, in milliseconds a layer.
"""

# ruff: noqa: T201
import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parents[1]
HEADS, SIZE, TEXTS, QUERY = 12, 32, 32, 15
LONGEST = (32, 64, 128, 256)
WAYS = {"compiled": "1", "torch": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    rows = [
        measured(longest, dtype, turns=arguments.turns) | {"longest": longest, "dtype": str(dtype).removeprefix("torch.")}
        for dtype in (torch.bfloat16, torch.float32)
        for longest in LONGEST
    ]
    report = {"command": "python benchmarks/packed_attention.py", "machine": machine(), "threads": arguments.threads, "rows": rows}
    out = ROOT / "benchmarks" / "results" / "packed_attention.json"
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}")


def measured(longest: int, dtype: Any, *, turns: int) -> dict[str, Any]:
    import torch

    from embedft import attention, native

    lengths = sorted([QUERY] * TEXTS + [longest - place % max(longest // 4, 1) for place in range(TEXTS)])
    groups = [(lengths.count(length), length) for length in sorted(set(lengths))]
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3 * HEADS * SIZE).to(dtype)
    grad = torch.randn(sum(lengths), HEADS * SIZE).to(dtype)
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(turns):
        for way, switch in WAYS.items():
            os.environ[native.OFF] = switch
            assert attention.kernels() == way, "no C compiler"
            began = time.perf_counter()
            made, sums = attention.attention(qkv, groups, HEADS)
            between = time.perf_counter()
            attention.attention_backward(grad, qkv, made, sums, groups, HEADS)
            seconds[way].append((between - began, time.perf_counter() - between))
    found: dict[str, Any] = {}
    for place, part in enumerate(("forward", "backward")):
        figures = {way: 1e3 * statistics.median(each[place] for each in seconds[way]) for way in WAYS}
        times = round(figures["torch"] / figures["compiled"], 2)
        found[part] = {way: round(figure, 3) for way, figure in figures.items()} | {"times": times}
    print(longest, dtype, found, flush=True)
    return found


if __name__ == "__main__":
    main()
