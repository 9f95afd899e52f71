"""Pairs a second and peak memory of training a retrieval adapter on the CPU: sentence-transformers' trainer with PEFT's LoRA, and ours.

Each run is a process of its own; the sides alternate, so that other work on the machine falls on all of them. Data: pydocs, made here
from the installed packages. Each side gets the same pairs, batch, epochs, learning rate, rank, threads and evaluation.

    python benchmarks/train_embed.py            # writes benchmarks/results/train_embed_<what ours computes in>.json
    python benchmarks/train_embed.py --lengths 64       # adds one length to what was measured under the same settings

Sides: `stock` is SentenceTransformerTrainer at its defaults (fp32) with PEFT's own targets for BERT (query, value); `stock_bf16` the
same under its bf16 autocast, `stock_last2` with the adapter on the last two layers only. `ours_same` has `stock`'s targets; `ours`
adapts every linear of every layer, `ours_last2` every linear of the last two layers (`ours_last1`: of the last), `ours_query` is a
query-only adapter. Each repeat has a seed of its own on every side; nDCG@10 is compared query by query over the mean of the seeds.
Pairs a second are pairs · epochs / (setup + steps · median step): the first
step's page faults count for nobody, what is computed once a run (making
the trainer included: ours tokenizes there) counts. `times_stock_cpu` is the same ratio in the process' own
CPU seconds, which other work on the machine hardly touches.
"""

# ruff: noqa: T201
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.training_sides import ALPHA, LR, RANK, SCALE, ours, recipe, stock, timer
from embedft.base import compute_dtype, native_bf16

ROOT = Path(__file__).parent.parent
LINEAR = 6 * (4 * 384 * 384 + 2 * 384 * 1536)  # weights of MiniLM's linear layers
SIDES = ("stock", "stock_bf16", "stock_last2", "ours_same", "ours", "ours_last2", "ours_last1", "ours_query")
WINS = ("ours_same", "ours", "ours_last2", "ours_last1", "ours_query")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=192)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--documents", type=int, default=150)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--data", type=Path, help="a pydocs folder made before")
    dtype = str(compute_dtype()).removeprefix("torch.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"train_embed_{dtype}.json")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(_run(json.loads(arguments.run))))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or _pydocs(Path(folder))
        _compare(arguments, data)


def _pydocs(folder: Path) -> Path:
    from embedft.pydocs import make_pydocs

    make_pydocs(folder)
    return folder


def _compare(arguments: argparse.Namespace, data: Path) -> None:
    report: dict[str, Any] = {
        "command": _command(),
        "settings": _settings(arguments),
        "machine": machine() | {"matmul_gflops": _matmul(arguments.threads)},
        "lengths": {},
    }
    if arguments.out.is_file():
        before = json.loads(arguments.out.read_text())
        if before["settings"] == report["settings"]:  # lengths measured before, one after the other
            report |= {"lengths": before["lengths"], "bf16_autocast": before.get("bf16_autocast")}
    if "stock" in arguments.sides and not native_bf16() and not report.get("bf16_autocast"):
        report["bf16_autocast"] = _bf16(arguments, data)
    for length in arguments.lengths:
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
        load = os.getloadavg()[0]
        for repeat in range(arguments.repeats):
            for side in (side for side in arguments.sides if repeat == 0 or side != "stock_last2"):
                job = _job(arguments, data, side, length) | {"evaluate": True, "seed": repeat}
                runs[side].append(_child(job, arguments.threads))
                print(length, side, {k: v for k, v in runs[side][-1].items() if not isinstance(v, list)}, flush=True)
        report["lengths"][str(length)] = _summary(runs, arguments) | {"load_average": [round(load, 1), round(os.getloadavg()[0], 1)]}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {arguments.out}")


def _matmul(threads: int) -> float:
    """What one large product reaches here in what ours computes in: the limit of any way of training."""
    import torch

    torch.set_num_threads(threads)
    one = torch.rand(2048, 1536, dtype=compute_dtype())
    other = torch.rand(1536, 1536, dtype=compute_dtype())
    seconds: list[float] = []
    for _ in range(12):
        began = time.perf_counter()
        torch.mm(one, other)
        seconds.append(time.perf_counter() - began)
    return 2 * one.numel() * 1536 / statistics.median(seconds) / 1e9


def _command() -> str:
    """The command line without this machine's paths."""
    given = iter(sys.argv[1:])
    kept = [part for part in given if part not in {"--data", "--out"} or not next(given)]
    return " ".join(["python benchmarks/train_embed.py", *kept])


def _job(arguments: argparse.Namespace, data: Path, side: str, length: int) -> dict[str, Any]:
    keys = ("pairs", "batch", "epochs", "queries", "documents", "threads")
    return {key: getattr(arguments, key) for key in keys} | {
        "data": str(data / "code"),
        "side": side,
        "length": length,
        "bf16": side == "stock_bf16",
        "seed": 0,
    }


def _bf16(arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    """The stock trainer under bf16 autocast, on few pairs, where the processor has no bf16 instructions: it emulates them."""
    job = _job(arguments, data, "stock", min(arguments.lengths)) | {"pairs": 8, "batch": 4, "epochs": 1, "evaluate": False}
    slow, fast = (_child(job | {"bf16": bf16}, arguments.threads) for bf16 in (True, False))
    figures = {name: job["batch"] / statistics.median(run["steps"][1:] or run["steps"]) for name, run in (("bf16", slow), ("fp32", fast))}
    note = "this processor has no bf16 instructions: products in bf16 are emulated, so ours computes in fp32 as well"
    return {"pairs_per_second": figures, "length": job["length"], "batch": job["batch"], "native_bf16": False, "note": note}


def _child(job: dict[str, Any], threads: int) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    argv = [sys.executable, __file__, "--run", json.dumps(job)]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{job['side']} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _summary(runs: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from embedft.training.statistics import paired_bootstrap

    sides: dict[str, Any] = {}
    for side, repeats in runs.items():
        seconds = [run["setup"] + len(run["steps"]) * statistics.median(run["steps"]) for run in repeats]
        used = [run["cpu_setup"] + len(run["cpu_steps"]) * statistics.median(run["cpu_steps"]) for run in repeats]
        speeds = [arguments.pairs * arguments.epochs / second for second in seconds]
        sides[side] = {
            "pairs_per_second": statistics.median(speeds),
            "each": [round(speed, 3) for speed in speeds],
            "pairs_per_cpu_second": arguments.pairs * arguments.epochs / statistics.median(used),
            "median_step_s": statistics.median(statistics.median(run["steps"]) for run in repeats),
            "setup_s": statistics.median(run["setup"] for run in repeats),
            "peak_bytes": int(statistics.median(run["peak"] for run in repeats)),
            "ndcg@10": float(_scores(repeats).mean()),
            "each_ndcg@10": [round(float(np.mean(run["scores"])), 4) for run in repeats],
            "trainable": repeats[0]["trainable"],
            "linear_gflops": _linear(repeats, arguments.batch),
        }
    base = np.array(runs.get("stock", [{"base": []}])[0]["base"])
    result: dict[str, Any] = {"sides": sides, "tokens": next(iter(runs.values()))[0]["tokens"]}
    if "stock" not in runs:
        return result
    result["base_ndcg@10"] = float(base.mean())
    stock = _scores(runs["stock"])
    result["stock_gain_ci95"] = paired_bootstrap(base, stock)
    for side in (name for name in WINS if name in runs):
        interval = paired_bootstrap(stock, _scores(runs[side]))
        sides[side] |= {
            "times_stock": _times(sides[side], sides["stock"]),
            "times_stock_cpu": sides[side]["pairs_per_cpu_second"] / sides["stock"]["pairs_per_cpu_second"],
            "ndcg_minus_stock_ci95": interval,
            "quality_kept": interval[1] >= 0,
            "memory_of_stock": sides[side]["peak_bytes"] / sides["stock"]["peak_bytes"],
        }
        if "stock_bf16" in sides:
            sides[side]["times_stock_bf16"] = _times(sides[side], sides["stock_bf16"])
    return result


def _times(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times as fast, by the median of the repeats' own ratios: what else the machine did falls on both sides of each."""
    return statistics.median(a / b for a, b in zip(one["each"], other["each"], strict=True))


def _scores(runs: list[dict[str, Any]]) -> Any:
    """(queries,) nDCG@10, the mean over the runs' seeds."""
    import numpy as np

    return np.mean([run["scores"] for run in runs], axis=0)


def _linear(runs: list[dict[str, Any]], batch: int) -> float:
    """GFLOP/s in the frozen linear layers, as if every layer were passed forth and back over the texts' own tokens: what a side computes
    beyond that (padding) lowers it, what it leaves out (cached layers) raises it."""
    tokens = batch * sum(runs[0]["tokens"].values())
    return 4 * LINEAR * tokens / statistics.median(statistics.median(run["steps"]) for run in runs) / 1e9


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """One training run in this process: seconds of each step, setup, peak bytes and the scores of every query."""
    import torch
    from transformers import PrinterCallback

    torch.set_num_threads(job["threads"])
    from embedft.embedding.data import load_data, make_examples
    from embedft.embedding.evaluate import evaluate_retrieval
    from embedft.training.measure import PeakMemory, trainable

    settings = recipe(job)
    examples, retrieval = load_data(settings.data, settings.eval, scored=False)
    examples = make_examples(examples.rows[: job["pairs"]])
    clock = timer()
    build = stock if job["side"].startswith("stock") else ours
    with tempfile.TemporaryDirectory() as folder:
        make, encoder, off = build(job, settings, examples, Path(folder))
        began, began_cpu = time.perf_counter(), time.process_time()
        trainer = make()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        with PeakMemory() as peak:
            trainer.train()
        setup, cpu_setup = clock.first - began, clock.first_cpu - began_cpu
    lengths = [
        len(ids) for text in ("query", "document") for ids in encoder.preparer.prepare([getattr(row, text) for row in examples.rows]).ids
    ]
    report = {
        "steps": clock.seconds,
        "setup": setup,
        "cpu_steps": clock.cpu,
        "cpu_setup": cpu_setup,
        "peak": peak.bytes,
        "trainable": trainable(trainer.model).count,
    }
    report["tokens"] = {"mean_query": statistics.mean(lengths[: len(examples)]), "mean_document": statistics.mean(lengths[len(examples) :])}
    if job["evaluate"]:
        model = encoder.model
        model.eval()
        report["scores"] = evaluate_retrieval(encoder, retrieval).per_query["ndcg@10"].tolist()
        with off():
            report["base"] = evaluate_retrieval(encoder, retrieval).per_query["ndcg@10"].tolist() if job["side"] == "stock" else []
    return report


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    keys = ("pairs", "batch", "epochs", "repeats", "threads", "queries", "documents", "sides")
    return {key: getattr(arguments, key) for key in keys} | {"base": "minilm", "r": RANK, "alpha": ALPHA, "lr": LR, "scale": SCALE}


if __name__ == "__main__":
    main()
