"""`embedft plan` against the run itself: peak memory by torch's own allocations, seconds a step.

python benchmarks/plan.py LM_DATA BEIR → benchmarks/results/plan.json; exit 1 where a peak is more than 15 % off
LM_DATA: a folder with train.jsonl of prompt and completion; BEIR: a retrieval set. CPU only: there each allocation is counted.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan.json"
STEPS = 4
LANGUAGE: tuple[tuple[str, ...], ...] = (
    (),
    ("train.gradient_checkpointing=true",),
    ("train.packing=true", "train.batch=4"),
    ("base.quantization=int8",),
    ("base.quantization=nf4",),
    ("adapter.method=dora",),
    ("adapter.method=prompt_tuning",),
    ("adapter.method=full", "train.optimizer=adamw_8bit"),
)
RETRIEVAL: tuple[tuple[str, ...], ...] = (
    (),
    ("base.quantization=nf4",),
    ("adapter.layers=2",),
    ("adapter.side=query",),
    ("adapter.dropout=0.1",),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("language", type=Path)
    parser.add_argument("retrieval", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for task, source, settings in (
            *(("causal_lm", arguments.language / "train.jsonl", each) for each in LANGUAGE),
            *(("embedding", arguments.retrieval, each) for each in RETRIEVAL),
        ):
            path = Path(folder) / "recipe.yaml"
            model, limit = ("seed-lm", 64) if task == "causal_lm" else ("minilm", 128)
            content = {"task": task, "name": "plan", "base": {"model": model}, "data": {"train": str(source.resolve()), "limit": limit}}
            path.write_text(json.dumps(content | {"train": {"batch": 16, "max_length": 128, "max_steps": STEPS}}), encoding="utf-8")
            rows.append(compared(path, settings, Path(folder)))
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    write(rows)
    raise SystemExit(any(abs(row["peak_ratio"] - 1) > 0.15 for row in rows))


def compared(path: Path, settings: tuple[str, ...], folder: Path) -> dict[str, Any]:
    from embedft.footprint import tensor_bytes
    from embedft.plan import plan
    from embedft.recipe_file import load_recipe
    from embedft.training.measure import TrackedMemory

    recipe: Any = load_recipe(path, settings)
    if recipe.task == "causal_lm":
        from embedft.causal_lm.sizes import batch_for

        made = plan(recipe, batch_for(recipe))
        model, make = language(recipe, folder)
    else:
        from embedft.embedding.sizes import batch_for

        made = plan(recipe, batch_for(recipe))
        model, make = retrieval(recipe, folder)
    held = tensor_bytes(model)
    with TrackedMemory() as memory:
        make().train()  # the packed trainer's merged weights are its own
    another = make()
    began = time.perf_counter()
    another.train()
    seconds = (time.perf_counter() - began) / STEPS
    measured = held + memory.bytes
    return {
        "task": recipe.task,
        "settings": list(settings),
        "planned_bytes": made.peak_bytes,
        "measured_bytes": measured,
        "peak_ratio": made.peak_bytes / measured,
        "planned_seconds_per_step": made.seconds_per_step,
        "measured_seconds_per_step": seconds,
    }


def language(recipe: Any, folder: Path) -> tuple[Any, Callable[[], Any]]:
    from embedft.base import BaseSpec, load_base
    from embedft.causal_lm.template import template_of
    from embedft.causal_lm.train import build_trainer, read_split, tokenized
    from embedft.methods import attach

    base = load_base(BaseSpec(recipe.base.model, recipe.base.quantization), task="causal_lm")
    examples = tokenized(read_split(recipe).train, template_of(base.tokenizer), recipe)
    model = attach(base, recipe.adapter, task="causal_lm")
    return model, functools.partial(build_trainer, model, base, examples, recipe.train, folder=folder / "run")


def retrieval(recipe: Any, folder: Path) -> tuple[Any, Callable[[], Any]]:
    from embedft.base import BaseSpec, load_base
    from embedft.embedding.data import load_data
    from embedft.embedding.losses import loss_named
    from embedft.embedding.train import make_trainer, plan_for, settings_for
    from embedft.methods import attach

    examples, _ = load_data(recipe.data, recipe.eval, scored=False)
    base = load_base(BaseSpec(recipe.base.model, recipe.base.quantization), task="embedding")
    settings = settings_for(recipe, base)
    model = attach(base, recipe.adapter, task="embedding")
    batches = plan_for(examples, recipe, loss=loss_named(recipe.loss.name), model=model)
    return model, functools.partial(make_trainer, model, base, settings, examples, recipe, plan=batches, output=folder / "run")


def write(rows: list[dict[str, Any]]) -> None:
    from benchmarks.machine import machine

    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
