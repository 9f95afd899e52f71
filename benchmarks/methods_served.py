"""Each adapter of benchmarks/methods.py in a live engine: does it load, and is its effect the trainer's?

python benchmarks/methods_served.py [--store runs/methods] [--engine vllm] [--base none] → benchmarks/results/methods_served.json, by engine
and base, and methods.md. Only the adapters of that base are asked for; those that an engine does not take are rows with its reason.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.methods import page
from tests.serve.world import ADMIN, launch

RESULTS = Path(__file__).parent / "results" / "methods_served.json"


def main() -> None:
    from embedft.adapters.store import AdapterStore

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("runs/methods"))
    parser.add_argument("--engine", choices=("vllm", "peft"), default="vllm")
    parser.add_argument("--base", choices=("none", "nf4", "int8"), default="none")
    arguments = parser.parse_args()
    store = AdapterStore(arguments.store)
    wanted = {name for name in store.names() if store.passport(name).base.quantization == arguments.base}
    rows = [row for row in served(arguments) if row["name"] in wanted]
    made = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    made[f"{arguments.engine} {arguments.base}"] = rows
    RESULTS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    trained = RESULTS.with_name("methods.json")
    if trained.is_file():
        trained.with_suffix(".md").write_text(f"{page(json.loads(trained.read_text(encoding='utf-8')))}\n", encoding="utf-8")
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")


def served(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the server says of every adapter of the store once its engine is warm and has proven them."""
    base = {"name": "seed", "model": "seed-lm", "quantization": arguments.base, "task": "causal_lm", "engine": arguments.engine}
    with tempfile.TemporaryDirectory() as folder:
        server = launch({"bases": [{**base, "max_loras": 4, "kv_gib": 0.3}]}, folder=Path(folder), store=arguments.store.resolve())
        try:
            server.wait_ready(600)
            listed = server.client.get("/v1/adapters", headers=ADMIN).json()["data"]
        finally:
            server.stop()
    return [
        {key: row.get(key) for key in ("name", "method", "r", "state", "reason")}
        | {"probe_error": (row.get("probe") or {}).get("error"), "tolerance": (row.get("probe") or {}).get("tolerance")}
        for row in listed
    ]


if __name__ == "__main__":
    main()
