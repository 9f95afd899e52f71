"""Every method of the table on one task, as PEFT's method comparison does: seed-lm, the intents of SNIPS, equal steps and batches,
rank and learning rate as in the method's shipped recipe.

python benchmarks/methods.py DATA [--methods a b] [--steps 150] → benchmarks/results/methods.json, each row by a process of its own
"""

# ruff: noqa: T201
import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.one_by_one import rows_one_by_one
from benchmarks.readme_training import methods_table

RESULTS = Path(__file__).parent / "results" / "methods.json"


def main() -> None:
    """Train and judge each method; a method that fails is a row with its reason."""
    from embedft.methods import METHODS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train.jsonl and test.jsonl of prompt and completion")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=200, help="test rows")
    parser.add_argument("--store", type=Path, default=Path("runs/methods"), help="keeps the adapters, for methods_served.py")
    parser.add_argument("--one", nargs=1, metavar="METHOD", help="one row, in this process: prints it")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_row(*arguments.one, arguments)))
        return
    about = {"task": arguments.data.name, "steps": arguments.steps, "batch": 16, "test_rows": arguments.rows}
    rows_one_by_one(__file__, RESULTS, about, [(method,) for method in arguments.methods], page=page, of=lambda row: (row["method"],))


def _row(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import bitsandbytes  # noqa: F401 (imported before the memory is measured)
    import peft  # noqa: F401

    from embedft.adapters.passport import read_passport
    from embedft.adapters.store import AdapterStore
    from embedft.causal_lm.train import train
    from embedft.errors import EmbedftError
    from embedft.methods import METHODS
    from embedft.recipe_file import load_recipe
    from embedft.verify import verify

    data = arguments.data
    settings = [f"data.train={data / 'train.jsonl'}", f"data.eval={data / 'test.jsonl'}", f"eval.rows={arguments.rows}"]
    settings += [f"train.max_steps={arguments.steps}", "train.max_length=64"]
    recipe: Any = load_recipe(f"method-{method.replace('_', '-')}", settings)
    quantization = recipe.base.quantization
    store = AdapterStore(arguments.store)
    try:
        result: Any = train(recipe, store=store, progress=False)
    except EmbedftError as error:
        return {"method": method, "base": quantization, "failed": str(error)}
    path = Path(result.path)
    begun = time.perf_counter()
    report = verify(path)
    return {
        "method": method,
        "base": quantization,
        "r": recipe.adapter.r,
        "lr": recipe.train.lr,
        "exact_match": result.metrics["adapter"]["exact_match"],
        "base_exact_match": result.metrics["base"]["exact_match"],
        "gain_ci95": result.metrics["gain_ci95"],
        "bits_per_character": result.metrics["adapter"]["bits_per_character"],
        "trainable": result.trainable,
        "adapter_bytes": (path / "adapter_model.safetensors").stat().st_size,
        "published_rank": read_passport(path).r,
        "peak_mib": round(result.peak_bytes / 2**20),
        "seconds": round(result.seconds, 1),
        "verified": report.passed,
        "probe_error": report.error,
        "verify_seconds": round(time.perf_counter() - begun, 1),
        "vllm": "yes" if METHODS[method].vllm else _as_lora(store, method),
    }


def _as_lora(store: Any, method: str) -> Any:
    """What conversion gives: the certificate's figures (the copy goes to the store), or why there is none."""
    from embedft.convert import convert
    from embedft.errors import EmbedftError

    name = f"method-{method}".replace("_", "-")
    try:
        with store.stage() as stage:
            made = convert(store.folder(name), stage, name=f"{name}-lora")
            store.put(stage, f"{name}-lora")
    except EmbedftError as error:
        return str(error)
    return {"rank": made.rank, "exact_rank": made.exact_rank, "error": made.error, "probes": made.probes, "tolerance": made.tolerance}


def page(made: dict[str, Any]) -> str:
    """methods.md: what each method learnt and, where benchmarks/methods_served.py has been run, who serves it."""
    served = RESULTS.with_name("methods_served.json")
    return methods_table({"methods": made, "served": json.loads(served.read_text(encoding="utf-8")) if served.is_file() else {}})


if __name__ == "__main__":
    main()
