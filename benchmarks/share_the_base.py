"""Every way of serving many adapters over one base, in one run: throughput, latency, memory, switching, loading.

    python -m benchmarks.share_the_base [--parts embedding,generation,…] [--rounds 3] [--gpu] [--out benchmarks/results]

Parts may be measured one by one: those measured before on the same machine stay in the results, each a run of its own.

Each way is a process of its own with the same cores; they are measured in turn, forth and back, once a round. A ratio is the
median over rounds of two neighbours in one run: between runs none is computed. See benchmarks/results/share_the_base_*.md.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.sharing import report
from benchmarks.sharing.sides import Measurement, Side, device, measure, opened
from benchmarks.sharing.workload import POPULARITIES, Request, adapters, arrivals, choose, llama, prompts, size_on_disk, texts
from serve.engines.settings import WAITING

COUNTS = (1, 2, 8, 32, 128)
FLIGHT = 32
TEXTS, PROMPTS = 768, 96  # a turn's worth for the quickest way
VLLM = [Side("vllm base", "vllm", "base"), Side("vllm plugin", "vllm", "plugin"), Side("vllm stock", "vllm", "stock", slow=True)]
PEFT = [
    Side("peft engine", "engine", "engine"),
    Side("PEFT mixed batch", "peft", "mixed"),
    Side("PEFT set_adapter", "peft", "switch", slow=True),
    Side("merged copies", "peft", "copies"),
    Side("reload at switch", "peft", "reload", slow=True),
]


def embedding(run: Measurement, work: Path, *, nf4: bool = False) -> None:
    """MiniLM, texts of 10 to 60 words: over N with Zipf popularity, then over popularities at N = 8; then open-loop."""
    from embedft.base import BaseSpec, base_folder

    base = base_folder(BaseSpec("minilm", "nf4" if nf4 else "none"))
    counts = (8,) if nf4 else run.counts
    folders = adapters(work / f"minilm-{nf4}", base, "embedding", max(counts))
    ids = texts(base, TEXTS, seed=1)
    part = "embedding-nf4" if nf4 else "embedding"
    run.sizes[part] = sizes(base, folders[0], "embedding")
    with opened(run.ways(VLLM if nf4 else VLLM + PEFT), base, "embedding", nf4=nf4) as sides:
        over_counts(run, part, sides, folders, counts, ids, tokens=1)
        if not nf4:
            open_loop(run, part, sides, max(counts), ids, tokens=1)


def over_counts(
    run: Measurement, part: str, sides: list[Side], folders: list[Path], counts: tuple[int, ...], ids: list[list[int]], *, tokens: int
) -> None:
    """Register up to each N, then measure; memory at each N; loading from disk at the end."""
    run.memory(part, 0, sides)
    rounds = run.rounds if tokens == 1 else max(1, run.rounds - 1)
    registered = 0
    for count in counts:
        sides = [side for side in sides if side.fits(count, run.sizes[part], run.limit)]
        for side in sides:
            side.register(folders[registered:count])
        registered = count
        for popularity in POPULARITIES if count == 8 and len(counts) > 1 else ("zipf",):
            chosen = choose(popularity, len(ids), count, seed=count)
            requests = [Request(adapter, row) for adapter, row in zip(chosen, ids, strict=True)]
            run.rows += measure(part, sides, requests, count=count, popularity=popularity, flight=FLIGHT, tokens=tokens, rounds=rounds)
        run.memory(part, count, sides)
        if count == max(counts):
            run.cold_loads(part, sides, folders[-1], ids[0], tokens=tokens)


def switching(run: Measurement, work: Path, *, nf4: bool = False) -> None:
    """MiniLM and two adapters, both in memory: what it costs that a request is for the other one."""
    from embedft.base import BaseSpec, base_folder

    base = base_folder(BaseSpec("minilm", "nf4" if nf4 else "none"))
    folders = adapters(work / f"switching-{nf4}", base, "embedding", 2)
    ids = texts(base, 1, seed=1)[0]
    ways = [side for side in run.ways(VLLM if nf4 else VLLM + PEFT) if side.mode != "base"]
    with opened(ways, base, "embedding", nf4=nf4) as sides:
        for side in sides:
            side.register(folders)
            side.run([Request(k % 2, ids) for k in range(4)], flight=1, tokens=1)
        run.switches("switching-nf4" if nf4 else "switching", sides, ids, tokens=1, stretches=40, times=4)


def best(sides: list[Side]) -> str:
    """The way with adapters that is to be the quickest: vLLM with the plugin, on a GPU vLLM as it is, without vLLM our own engine."""
    labels = [side.label for side in sides]
    return next(label for label in ("vllm plugin", "vllm stock", "peft engine", "PEFT mixed batch") if label in labels)


def open_loop(run: Measurement, part: str, sides: list[Side], count: int, ids: list[list[int]], *, tokens: int) -> None:
    """Arrivals at about half of what the best way took at this N: that way, the base and our own engine."""
    sides = [side for side in sides if side.label in ("vllm base", best(sides), "peft engine")]
    taken = [row["throughput"] for row in run.rows if (row["part"], row["way"], row["N"]) == (part, best(sides), count)]
    ids = ids[: len(ids) // 3]
    due = arrivals(len(ids), 0.5 * taken[-1], seed=3)
    chosen = choose("zipf", len(ids), count, seed=3)
    requests = [Request(adapter, row, at) for adapter, row, at in zip(chosen, ids, due, strict=True)]
    rows = measure(part, sides, requests, count=count, popularity="zipf", flight=FLIGHT, tokens=tokens, rounds=run.rounds)
    run.rows += [{**row, "arrivals": "gamma, cv 1", "rate": 0.5 * taken[-1]} for row in rows]


def generation(run: Measurement, work: Path) -> None:
    """A random Llama of 135 M parameters: all ways over N; then open-loop."""
    base = llama(work / "llama")
    folders = adapters(work / "llama-adapters", base, "causal_lm", max(run.counts))
    run.sizes["generation"] = sizes(base, folders[0], "causal_lm")
    ways = [*VLLM, *(side for side in PEFT if side.mode in ("engine", "mixed", "switch", "copies"))]
    with opened(run.ways(ways), base, "causal_lm") as sides:
        ids = prompts(PROMPTS, 16, seed=1)
        over_counts(run, "generation", sides, folders, run.counts, ids, tokens=8)
        open_loop(run, "generation", sides, max(run.counts), ids, tokens=8)


def sequences(run: Measurement, work: Path, *, nf4: bool = False) -> None:
    """The same Llama in vLLM, 32 sequences over 8 adapters: nothing but reading the prompt, then nearly nothing but writing."""
    from embedft.base import BaseSpec, base_folder

    source = llama(work / "llama")
    folders = adapters(work / f"sequences-{nf4}", source, "causal_lm", 8)
    base = base_folder(BaseSpec(str(source), "nf4")) if nf4 else source
    with opened(run.ways(VLLM), base, "causal_lm", nf4=nf4) as sides:
        for side in sides:
            side.register(folders)
        for part, length, tokens in (("prefill", 48, 1), ("decode", 2, 12)):
            requests = [Request(k % 8, row) for k, row in enumerate(prompts(PROMPTS, length, seed=2))]
            part += "-nf4" if nf4 else ""
            run.rows += measure(part, sides, requests, count=8, popularity="distinct", flight=FLIGHT, tokens=tokens, rounds=run.rounds)


def large(run: Measurement, work: Path) -> None:
    """A random Llama of 1.1 B parameters in NF4: memory, switching and loading, against merged copies until memory ends."""
    from embedft.base import BaseSpec, base_folder

    source = llama(work / "llama-1b", hidden=2048, layers=16, heads=32, kv_heads=8, inner=8192)
    folders = adapters(work / "llama-1b-adapters", source, "causal_lm", 32)
    base = base_folder(BaseSpec(str(source), "nf4"))
    run.sizes["large-nf4"] = sizes(base, folders[0], "causal_lm")
    ids = prompts(1, 16, seed=1)[0]
    ways = [side for side in run.ways([*VLLM, *PEFT]) if side.label in ("vllm base", best(run.ways(VLLM)), "merged copies")]
    with opened(ways, base, "causal_lm", nf4=True) as sides:
        run.memory("large-nf4", 0, sides)
        registered = 0
        for count in (1, 2, 4, 8, 16, 32):
            fitting = [side for side in sides if side.fits(count, run.sizes["large-nf4"], run.limit)]
            for side in fitting:
                side.register(folders[registered:count])
                side.run([Request(count - 1, ids)], flight=1, tokens=1)
            registered = count
            run.memory("large-nf4", count, fitting)
            if count == 2:
                run.switches("large-nf4", fitting, ids, tokens=1, stretches=4, times=6)
        run.cold_loads("large-nf4", fitting, folders[-1], ids, tokens=1)


def sizes(base: Path, adapter: Path, task: Any) -> dict[str, int]:
    """Bytes on disk; a merged copy takes at least the base's. `weights`: of the base in memory."""
    from embedft.base import load_model
    from embedft.footprint import tensor_bytes

    weights = tensor_bytes(load_model(base, task=task))
    return {"base": size_on_disk(base), "copy": size_on_disk(base), "adapter": size_on_disk(adapter), "weights": weights}


PARTS = {
    "embedding": embedding,
    "generation": generation,
    "switching": switching,
    "sequences": sequences,
    "embedding-nf4": lambda run, work: embedding(run, work, nf4=True),
    "switching-nf4": lambda run, work: switching(run, work, nf4=True),
    "sequences-nf4": lambda run, work: sequences(run, work, nf4=True),
    "large-nf4": large,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Every way of serving many adapters over one base, in one run.")
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="numbers of adapters")
    parser.add_argument("--rounds", type=int, default=3, help="of embedding; generation takes one less")
    parser.add_argument("--memory-limit", type=float, default=4.0, help="GiB that merged copies may take")
    parser.add_argument("--gpu", action="store_true", help="on CUDA: vLLM compiled and with its own LoRA kernels, as they are there")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    chosen: Any = parser.parse_args()
    os.environ.update(WAITING, HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(len(os.sched_getaffinity(0))))
    if not chosen.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # each way takes a GPU where it sees one
    gpu = device()
    if chosen.gpu and gpu is None:
        parser.error("--gpu: torch sees no CUDA device here; leave it out to measure the CPU")
    run = Measurement(rounds=chosen.rounds, counts=tuple(map(int, chosen.counts.split(","))), limit=chosen.memory_limit, gpu=gpu)
    work = Path(tempfile.mkdtemp(prefix="share-the-base-"))
    try:
        for part in chosen.parts.split(","):
            PARTS[part](run, work)
            report.write(run.as_json(), chosen.out)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
