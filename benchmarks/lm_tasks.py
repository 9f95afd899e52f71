"""LoRA, QLoRA and full fine-tuning of seed-lm on five public tasks, against the base: score, share trained, memory, time.

python benchmarks/lm_tasks.py DATA [--tasks a b] [--steps 500] → benchmarks/results/lm_tasks.json, a row as each is done
DATA holds a folder a task with train.jsonl and test.jsonl. Learning rates are those of the shipped recipes, not tuned here.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "lm_tasks.json"
TASKS: dict[str, dict[str, Any]] = {
    "banking77": {"metric": "exact_match", "max_new_tokens": 16},
    "snips_intent": {"metric": "exact_match", "max_new_tokens": 8},
    "snips_slots": {"metric": "token_f1", "max_new_tokens": 48},
    "e2e_nlg": {"metric": "bleu", "max_new_tokens": 64},
    "nl2bash": {"metric": "token_f1", "max_new_tokens": 48},
}
METHODS = ("lora", "qlora", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=300, help="test rows")
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    if RESULTS.is_file():
        rows = {f"{row['task']} {row['method']}": row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}
    for task in arguments.tasks:
        for method in arguments.methods:
            if f"{task} {method}" not in rows:
                rows[f"{task} {method}"] = run(task, method, arguments)
                write(rows, arguments)
                sys.stdout.write(json.dumps(rows[f"{task} {method}"]) + "\n")
                sys.stdout.flush()


def run(task: str, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from embedft.adapters.store import AdapterStore
    from embedft.causal_lm.train import train
    from embedft.recipe import load_recipe
    from embedft.verify import verify

    data, wanted = arguments.data / task, TASKS[task]
    settings = [f"name={task.replace('_', '-')}-{method}", f"data.train={data / 'train.jsonl'}", f"data.eval={data / 'test.jsonl'}"]
    settings += [f"train.max_steps={arguments.steps}", "train.max_length=160", f"eval.rows={arguments.rows}"]
    settings += [f"eval.metric={wanted['metric']}", f"eval.max_new_tokens={wanted['max_new_tokens']}"]
    recipe: Any = load_recipe(f"method-{method}", settings)
    with tempfile.TemporaryDirectory() as folder:
        result: Any = train(recipe, store=AdapterStore(Path(folder)), progress=False)
        report = verify(Path(result.path))
        base = result.metrics["base"]
    return {
        "task": task,
        "method": method,
        "metric": wanted["metric"],
        "base": base[wanted["metric"]],
        "score": result.metrics["adapter"][wanted["metric"]],
        "gain_ci95": result.metrics["gain_ci95"],
        "metrics": result.metrics["adapter"],
        "trainable_percent": 100 * result.trainable / BASE_PARAMETERS,
        "peak_mib": round(result.peak_bytes / 2**20),
        "seconds": round(result.seconds, 1),
        "verified": report.passed,
        "probe_error": report.error,
    }


BASE_PARAMETERS = 4_196_608


def write(rows: dict[str, Any], arguments: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from demo import machine

    about = {"steps": arguments.steps, "batch": 16, "test_rows": arguments.rows, "machine": machine()}
    RESULTS.write_text(json.dumps({**about, "rows": list(rows.values())}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
