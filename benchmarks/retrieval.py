"""What an adapter adds on public retrieval sets: base, BM25, adapter, query-only adapter, and BM25 fused with the adapter.

    python benchmarks/retrieval.py finance_10k|medquad|cranfield|persian      # writes benchmarks/results/retrieval_NAME.json

Data: ../shared/data/retrieval, or --data. The recipes are recipes/embedding/; none of them was chosen by its test queries. The query-only
adapter is the same recipe with adapter.side=query, every layer and three times the epochs: its documents are encoded once, so they are
cheap. Every interval is a paired bootstrap over the test queries.
"""

# ruff: noqa: T201
import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Task:
    """Folders under --data: `train` (or `corpus`, from which data synth makes the training queries) and `eval`."""

    recipe: str
    eval: str
    train: str | None = None
    published: dict[str, Any] | None = None


BGE = {
    "source": "run-llama/finetune-embedding, BGE-small-en before and after",
    "hit@5": [0.787, 0.844],
    "mrr@10": [0.609, 0.708],
    "ndcg@10": [0.658, 0.754],
}
TASKS = {
    "finance_10k": Task("finance-10k", "finance_10k_uber", "finance_10k_lyft", published=BGE),
    "medquad": Task("medquad", "medquad", "medquad"),
    "cranfield": Task("cranfield-synth", "cranfield"),
    "persian": Task("persian", "persian_parsinlu_rc", "persian_parsinlu_rc"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TASKS)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "retrieval")
    parser.add_argument("--set", metavar="key=value", nargs="+", default=[], help="settings over the recipe's, for a trial")
    parser.add_argument(
        "--seeds", type=int, default=1, help="trainings of the recipe, each with another seed; all are reported, the first in full"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    task = TASKS[arguments.name]
    if missing := {name for name in (task.train, task.eval) if name and not (arguments.data / name).is_dir()}:
        parser.error(f"no {', no '.join(sorted(missing))} in {arguments.data}: these public sets are not shipped: name their --data")
    with tempfile.TemporaryDirectory() as folder:
        report = _measure(task, arguments.data, Path(folder), arguments.set, seeds=arguments.seeds)
    report = {
        "name": arguments.name,
        "command": f"python benchmarks/retrieval.py {arguments.name}" + (f" --seeds {arguments.seeds}" if arguments.seeds > 1 else ""),
        "machine": machine(),
        "cpu_seconds": round(time.process_time(), 1),
        **report,
    }
    out = arguments.results / f"retrieval_{arguments.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out}")


def _measure(task: Task, data: Path, folder: Path, settings: list[str], *, seeds: int) -> dict[str, Any]:
    from embedft.adapters.store import AdapterStore
    from embedft.recipe_file import load_recipe

    store = AdapterStore(folder / "adapters")
    report: dict[str, Any] = {"recipe": f"recipes/embedding/{task.recipe}.yaml"}
    files = [f"data.eval={data / task.eval}", *settings]
    if task.train is None:
        report["synth"] = _synthesize(data / task.eval, folder / "synth.jsonl")
        files.append(f"data.train={folder / 'synth.jsonl'}")
    else:
        files.append(f"data.train={data / task.train}")
    both = _train(task.recipe, files, store)
    report |= {name: both[name] for name in ("metric", "queries", "documents", "base", "bm25")}
    report["adapters"] = {"both": both}
    first: Any = load_recipe(task.recipe, files)
    more = [_train(task.recipe, [*files, f"train.seed={first.train.seed + k}", f"name={task.recipe}-{k}"], store) for k in range(1, seeds)]
    report["seeds"] = [found["adapter"] for found in (both, *more)]
    if task.train is not None:
        query = _train(task.recipe, [*files, "adapter.side=query", f"name={task.recipe}-query"], store, longer=3)
        report["adapters"]["query"] = query
        report["query_minus_both_ci95"] = _difference(store, f"{task.recipe}-query", task.recipe, both["metric"])
    return report | ({"published": task.published} if task.published else {})


def _synthesize(corpus: Path, out: Path) -> dict[str, Any]:
    from embedft.embedding.synth import Synth, synthesize

    report = asdict(synthesize(str(corpus), out, synth=Synth(), base=None))
    return {key: value for key, value in report.items() if key != "path"}


def _train(name: str, settings: list[str], store: Any, *, longer: int = 1) -> dict[str, Any]:
    from embedft.embedding.train import train
    from embedft.recipe_file import load_recipe

    given: Any = load_recipe(name)
    extra = [f"train.epochs={given.train.epochs * longer}", "adapter.layers=null"] if longer > 1 else []
    recipe: Any = load_recipe(name, [*settings, *extra])
    result: Any = train(recipe, store=store, force=True)  # what the general set lost is in the report
    metrics = result.metrics
    print(recipe.name, {side: round(metrics[side][recipe.eval.metric], 4) for side in ("base", "bm25", "adapter", "fused")}, flush=True)
    kept = ("metric", "queries", "base", "bm25", "adapter", "fused", "gain_ci95", "intervals", "strata", "index", "guard")
    cost = {"peak_bytes": result.peak_bytes, "trainable": result.trainable}
    figures = {key: metrics[key] for key in kept if key in metrics}
    return figures | cost | {"documents": metrics["index"]["documents"], "epochs": recipe.train.epochs, "layers": recipe.adapter.layers}


def _difference(store: Any, one: str, other: str, metric: str) -> list[float]:
    """The interval of the first adapter's score minus the second's, from what their folders keep of each query."""
    import numpy as np

    from embedft.training.statistics import paired_bootstrap

    scores: list[dict[str, float]] = []
    for name in (other, one):
        lines = (store.folder(name) / "eval" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        scores.append({row["id"]: row["adapter"][metric] for row in map(json.loads, lines)})
    ids = sorted(scores[0])
    return list(paired_bootstrap(*(np.array([rows[identifier] for identifier in ids]) for rows in scores)))


if __name__ == "__main__":
    main()
