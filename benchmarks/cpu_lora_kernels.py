"""What the adapters add to one projection on one core: the compiled kernel, torch alone, and vLLM's own operations.

    python -m benchmarks.cpu_lora_kernels [float32|bfloat16]

The best of many repetitions of each, taken in turn; microseconds, and in brackets the share of the base's own product.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SHAPES = {
    "MiniLM q, k, v": (384, (384, 384, 384)),
    "MiniLM output": (384, (384,)),
    "MiniLM up": (384, (1536,)),
    "MiniLM down": (1536, (384,)),
    "Llama 135 M q, k, v": (576, (576, 192, 192)),
    "Llama 135 M gate, up": (576, (1536, 1536)),
    "Llama 135 M down": (1536, (576,)),
}
BATCHES = {
    "decode: 32 sequences, 8 adapters": (32, 1),
    "prefill: 32 texts of 45 tokens, 8 adapters": (1440, 45),
    "prefill: 1,440 tokens, 1 adapter": (1440, 1440),
}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    dtype = getattr(torch, sys.argv[1] if len(sys.argv) > 1 else "float32")
    lines = [f"rank 16, {os.cpu_count()} cores of which one is used, {str(dtype).removeprefix('torch.')}", ""]
    lines += ["| batch | projection | base | kernel | torch | vLLM's own |", "|---|---|---|---|---|---|"]
    for batch, (tokens, length) in BATCHES.items():
        for name, (inputs, outs) in SHAPES.items():
            best = measured(tokens, length, inputs, outs, dtype)
            shares = [f"{1e6 * seconds:.0f} ({seconds / best[0]:.2f})" for seconds in best[1:]]
            lines.append(f"| {batch} | {name} | {1e6 * best[0]:.0f} | {' | '.join(shares)} |")
    sys.stdout.write("\n".join(lines) + "\n")


def measured(tokens: int, length: int, inputs: int, outs: tuple[int, ...], dtype: Any) -> list[float]:
    """Seconds of the base's product, the kernel, torch, vLLM."""
    import torch
    from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink

    from serve.vllm_cpu_lora import kernels
    from serve.vllm_cpu_lora.plan import make_plan
    from serve.vllm_cpu_lora.slots import Slots

    of = np.arange(tokens) // length % 8
    a = tuple(torch.randn(8, 1, 16, inputs, dtype=dtype) for _ in outs)
    b = tuple(torch.randn(8, 1, out, 16, dtype=dtype) for out in outs)
    slots, plan, index = Slots.stacked(a, b), make_plan(of), torch.from_numpy(of)
    for slot in range(8):
        slots.ranks[slot] = 16
    x, weight = torch.randn(tokens, inputs, dtype=dtype), torch.randn(sum(outs), inputs, dtype=dtype)
    y = torch.zeros(tokens, sum(outs), dtype=dtype)

    def stock() -> None:
        offset = 0
        for a_slice, b_slice, out in zip(a, b, outs, strict=True):
            buffer = torch.zeros(tokens, 16)
            bgmv_shrink(x, a_slice, buffer, index, 1.0)
            bgmv_expand_slice(buffer, b_slice, y, index, offset, out, True)
            offset += out

    ways: list[Callable[[], object]] = [
        lambda: torch.nn.functional.linear(x, weight),
        lambda: kernels.add(y, x, slots, plan),
        lambda: kernels.by_torch(y, x, slots, plan),
        stock,
    ]
    best = [float("inf")] * len(ways)
    for repeat in range(40):
        for k, way in enumerate(ways):
            if k == 3 and tokens > 100 and repeat > 2:
                continue  # a tenth of a second each
            start = time.perf_counter()
            way()
            best[k] = min(best[k], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
