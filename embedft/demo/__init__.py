"""`embedft demo`: the whole line on this machine: data, four adapters, one server over two quantized bases, and a report."""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec, base_folder
from embedft.demo.report import write_report
from embedft.demo.session import Server, ask, switch_ms
from embedft.footprint import footprint
from embedft.model_folder import Task
from embedft.recipe_file import load_recipe
from embedft.training.measure import AdapterResult

# recipe, the folder of its data under pydocs, and whether that is a retrieval set
PLAN = (("pydocs-code", "code"), ("pydocs-readme", "readme"), ("pydocs-package", "lm_package"), ("pydocs-argument", "lm_argument"))
LM_ROWS = ("data.limit=1600",)  # of 2,400: the demo is to end within minutes on two cores
QUICK = {  # as many steps as an adapter needs for an effect that stands out from what bf16 rounds
    "embedding": ("data.limit=64", "train.epochs=6", "train.max_length=64", "eval.queries=30", "eval.documents=60", "eval.guard=null"),
    "causal_lm": ("data.limit=160", "eval.rows=40"),
}
QUICK_PACKAGES = ("numpy", "networkx")
QUERY = "Return the number of items in the container."


def demo(out: Path, *, engine: str | None = None, quick: bool = False) -> dict[str, Any]:
    """Run everything afresh under `out` and return the report, also written there as report.md, report.json and a figure.

    `quick` takes every step on a fraction of the data: it shows that all works here, not how much the adapters gain.
    """
    from embedft.pydocs import make_pydocs

    started = time.perf_counter()
    for part in ("data", "adapters"):
        shutil.rmtree(out / part, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    _say("1/4 data from the Python packages installed here")
    make_pydocs(out / "data", seed=7, packages=QUICK_PACKAGES if quick else None)
    store = AdapterStore(out / "adapters")
    trained = [_train(recipe, out / "data" / data, store, number, quick=quick) for number, (recipe, data) in enumerate(PLAN, start=1)]
    _say("3/4 one server, two quantized bases, four adapters")
    with Server(store.root, engine=engine, log=out / "server.log") as server:
        report: dict[str, Any] = {
            "quick": quick,
            "engines": server.engines,
            "quality": [_quality(recipe, result) for recipe, result in trained],
            "answers": ask(server, query=QUERY, prompt=_a_prompt(out / "data" / "lm_package" / "test.jsonl")),
            "switch_ms": switch_ms(server, rounds=8 if quick else 40),
            "parity": server.parity(),
            "ready_seconds": round(server.ready_seconds, 1),
            "server_memory_bytes": server.memory(),
        }
    _say("4/4 memory: a shared base against merged copies")
    report["memory_bytes"] = _memory(store, ("causal_lm",) if quick else ("embedding", "causal_lm"))
    report["seconds"] = round(time.perf_counter() - started, 1)
    write_report(out, report)
    return report


def _train(name: str, data: Path, store: AdapterStore, number: int, *, quick: bool) -> tuple[Any, AdapterResult]:
    _say(f"2/4 adapter {number} of {len(PLAN)}: {name}")
    if data.name.startswith("lm_"):
        from embedft.causal_lm.train import train

        files = [f"data.train={data / 'train.jsonl'}", f"data.eval={data / 'test.jsonl'}"]
        recipe = load_recipe(name, [*files, *(QUICK["causal_lm"] if quick else LM_ROWS)])
    else:
        from embedft.embedding.train import train

        files = [f"data.train={data}", f"data.eval={data}"]
        recipe = load_recipe(name, [*files, *(QUICK["embedding"] if quick else ())])
    result: Any = train(recipe, store=store)  # pyright: ignore[reportArgumentType]
    return recipe, result


def _quality(recipe: Any, result: AdapterResult) -> dict[str, Any]:
    metrics: Any = result.metrics
    metric = recipe.eval.metric
    return {
        "adapter": result.name,
        "task": recipe.task,
        "metric": metric,
        "base": metrics["base"][metric],
        "bm25": (metrics.get("bm25") or {}).get(metric),
        "score": metrics["adapter"][metric],
        "gain_ci95": metrics["gain_ci95"],
        "train_seconds": round(result.seconds, 1),
        "trainable": result.trainable,
    }


def _memory(store: AdapterStore, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """For each base: its adapters shared over it, and as merged copies."""
    rows: list[dict[str, Any]] = []
    for task in tasks:
        names = [name for name in store.names() if store.passport(name).task == task]
        base = store.passport(names[0]).base
        folder = base_folder(BaseSpec(base.model, base.quantization, base.revision))
        for way in ("shared", "merged"):
            measured = footprint(folder, [store.folder(name) for name in names], task=task, way=way)
            rows.append({"base": f"{base.model} {base.quantization}", **vars(measured)})
    return rows


def _a_prompt(rows: Path) -> str:
    import json

    return json.loads(rows.read_text(encoding="utf-8").splitlines()[0])["prompt"]


def _say(line: str, *, started: float = time.perf_counter()) -> None:
    print(f"[demo {time.perf_counter() - started:3.0f} s] {line}", file=sys.stderr, flush=True)  # noqa: T201
