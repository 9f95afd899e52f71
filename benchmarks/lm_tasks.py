"""LoRA, QLoRA and full fine-tuning of seed-lm on five public tasks, against the base: score, share trained, memory, time.

python benchmarks/lm_tasks.py DATA [--tasks a b] → benchmarks/results/lm_tasks.json, each row by a process of its own
DATA holds a folder a task with train.jsonl and test.jsonl. Learning rates are those of the shipped recipes, not tuned here.
"""

# ruff: noqa: T201
import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.one_by_one import rows_one_by_one
from benchmarks.readme_training import tasks_table

RESULTS = Path(__file__).parent / "results" / "lm_tasks.json"
TASKS: dict[str, dict[str, Any]] = {
    "banking77": {"metric": "exact_match", "max_new_tokens": 16},
    "snips_intent": {"metric": "exact_match", "max_new_tokens": 8},
    "snips_slots": {"metric": "token_f1", "max_new_tokens": 48},
    "e2e_nlg": {"metric": "bleu", "max_new_tokens": 64},
    "nl2bash": {"metric": "token_f1", "max_new_tokens": 48},
}
METHODS = ("lora", "qlora", "full")
EPOCHS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rows", type=int, default=200, help="test rows")
    parser.add_argument("--one", nargs=2, metavar=("TASK", "METHOD"), help="one row, in this process: prints it")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(*arguments.one, arguments)))
        return
    about = {"epochs": EPOCHS, "batch": 16, "test_rows": arguments.rows}
    cells = [(task, method) for task in arguments.tasks for method in arguments.methods]
    rows_one_by_one(__file__, RESULTS, about, cells, page=tasks_table, of=lambda row: (row["task"], row["method"]))


def run(task: str, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import bitsandbytes  # noqa: F401 (imported before the memory is measured)
    import peft  # noqa: F401

    from embedft.adapters.store import AdapterStore
    from embedft.causal_lm.train import train
    from embedft.recipe_file import load_recipe
    from embedft.verify import verify

    data, wanted = arguments.data / task, TASKS[task]
    settings = [f"name={task.replace('_', '-')}-{method}", f"data.train={data / 'train.jsonl'}", f"data.eval={data / 'test.jsonl'}"]
    settings += [f"train.epochs={EPOCHS}", "train.max_length=160", f"eval.rows={arguments.rows}"]
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


if __name__ == "__main__":
    main()
