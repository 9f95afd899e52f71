"""Training speed and memory beside TRL's SFTTrainer: the same base, PEFT method, rows, batch and steps; each run in a process of its own.

python benchmarks/train_lm.py DATA [--steps 100] [--rounds 3] → benchmarks/results/train_lm_<what is computed in>.json
DATA: a folder with train.jsonl of prompt and completion. Sides alternate, and the median of the rounds counts. Packed, a batch holds
some eight times as much, and a quarter of the steps are taken.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROWS, BATCH, LENGTH, RANK, WARM = 2000, 16, 256, 16, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", nargs=2, help="one run, in this process: prints its figures")
    arguments = parser.parse_args()
    if arguments.side:
        sys.stdout.write(json.dumps(one(arguments.data, *arguments.side, steps=arguments.steps)) + "\n")
        return
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for side, scheme in (("embedft", "none"), ("trl", "none"), ("embedft", "nf4"), ("trl", "nf4"), ("embedft-packed", "none")):
            steps = arguments.steps // (4 if side == "embedft-packed" else 1)
            command = [sys.executable, __file__, str(arguments.data), "--steps", str(steps), "--side", side, scheme]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.setdefault((side, scheme), []).append(json.loads(done.stdout.splitlines()[-1]))
            sys.stdout.write(f"{side} {scheme} {runs[side, scheme][-1]}\n")
            sys.stdout.flush()
    write(runs, arguments)


def write(runs: dict[tuple[str, str], list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    from benchmarks.machine import machine
    from embedft.base import compute_dtype

    rows: list[dict[str, Any]] = []
    for (side, scheme), made in runs.items():
        row: dict[str, Any] = {"side": side, "base": scheme, "runs": made}
        for name in ("tokens_per_second", "examples_per_second", "peak_bytes"):
            row[name] = statistics.median(run[name] for run in made)
        rows.append(row)
    about = {"data": arguments.data.name, "batch": BATCH, "max_length": LENGTH, "r": RANK, "steps": arguments.steps, "machine": machine()}
    dtype = str(compute_dtype()).removeprefix("torch.")
    whole = {**about, "dtype": dtype, "rows": rows}
    (RESULTS / f"train_lm_{dtype}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def one(data: Path, side: str, scheme: str, *, steps: int) -> dict[str, Any]:
    """Tokens (padding not counted) and examples a second after WARM steps, and how far the process grew from the loaded base on."""
    import tempfile

    import torch
    from transformers import TrainerCallback

    from embedft.base import BaseSpec, load_base
    from embedft.training.measure import PeakMemory

    base = load_base(BaseSpec("seed-lm", scheme), task="causal_lm")
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]]
    torch.manual_seed(7)
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as peak:
        make = trl_side if side == "trl" else our_side
        trainer, seen = make(base, rows, steps, Path(folder), packing=side.endswith("packed"))

        class Clock(TrainerCallback):
            began = ended = 0.0

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
                if state.global_step == WARM:
                    self.began = time.perf_counter()
                self.ended = time.perf_counter()

        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    passes = trainer.args.gradient_accumulation_steps
    seconds, timed = clock.ended - clock.began, seen.batches[WARM * passes : steps * passes]
    return {
        "tokens_per_second": sum(tokens for tokens, _ in timed) / seconds,
        "examples_per_second": sum(examples for _, examples in timed) / seconds,
        "peak_bytes": peak.bytes,
        "seconds": seconds,
    }


class Seen:
    """What a collator is given: tokens and examples of each batch, in order. Batches are drawn ahead of their steps."""

    def __init__(self, collate: Any, size: Any) -> None:
        self._collate, self._size = collate, size
        self.batches: list[tuple[int, int]] = []

    def __call__(self, rows: Any) -> Any:
        sizes = [self._size(row) for row in rows]
        self.batches.append((sum(tokens for tokens, _ in sizes), sum(examples for _, examples in sizes)))
        return self._collate(rows)


def our_side(base: Any, rows: list[dict[str, str]], steps: int, folder: Path, *, packing: bool) -> tuple[Any, Seen]:
    from embedft.causal_lm.data import Message, Row
    from embedft.causal_lm.template import template_of
    from embedft.causal_lm.train import build_trainer, tokenized
    from embedft.methods import attach
    from embedft.recipe import parse_recipe

    content: dict[str, Any] = {"task": "causal_lm", "name": "speed", "base": {"model": "seed-lm"}, "data": {"train": "-"}}
    train = {"batch": BATCH, "max_length": LENGTH, "max_steps": steps, "lr": 1e-3, "packing": packing}
    recipe: Any = parse_recipe({**content, "train": train, "adapter": {"r": RANK}})
    given = [Row(str(n), (Message("user", row["prompt"]), Message("assistant", row["completion"]))) for n, row in enumerate(rows)]
    examples = tokenized(given, template_of(base.tokenizer), recipe)
    trainer = build_trainer(attach(base, recipe.adapter, task="causal_lm"), base, examples, recipe.train, folder=folder)
    size = (lambda pack: (len(pack.ids), len(pack.examples))) if packing else (lambda example: (len(example.ids), 1))
    trainer.data_collator = Seen(trainer.data_collator, size)
    return trainer, trainer.data_collator


def trl_side(base: Any, rows: list[dict[str, str]], steps: int, folder: Path, *, packing: bool) -> tuple[Any, Seen]:  # noqa: ARG001
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from embedft.base import compute_dtype

    given = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "completion": [{"role": "assistant", "content": row["completion"]}]}
        for row in rows
    ]
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        max_length=LENGTH,
        gradient_checkpointing=False,
        bf16=compute_dtype() is torch.bfloat16,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        completion_only_loss=True,
    )
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer: Any = SFTTrainer(
        model=base.model, args=config, train_dataset=Dataset.from_list(given), processing_class=base.tokenizer, peft_config=lora
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # bf16 over a 4-bit base, by TRL: a processor without bf16 emulates it, a hundred times slower
            parameter.data = parameter.data.float()
    trainer.data_collator = Seen(trainer.data_collator, lambda row: (len(row["input_ids"]), 1))
    return trainer, trainer.data_collator


if __name__ == "__main__":
    main()
