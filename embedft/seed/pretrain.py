"""Pretrain seed-lm on a CPU (or one GPU) and export it as a transformers folder.

    python -m embedft.seed.pretrain --books PATH --out DIR --hours 1.3

DIR holds everything between runs: `data/` (token arrays), `checkpoint.safetensors` (weights, optimizer, step, seconds spent), `export/`.
SIGTERM or Ctrl-C writes a checkpoint and exports; the same command line goes on from there. With `--steps` the schedule depends on the
step alone, and a resumed run repeats an undisturbed one; with `--hours` it follows the training seconds spent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from embedft.base import compute_dtype
from embedft.seed.card import card
from embedft.seed.check import Scores, score
from embedft.seed.data import Batches, Budget, copy_sources, prepare
from embedft.seed.model import SeedLM, Shape
from embedft.seed.optimizer import MuonAdamW
from embedft.seed.tokenizer import save_tokenizer

TOKENS = 4096  # a step's tokens, whatever its sequence length
LENGTH, LONG = 512, 2048
LONG_EVERY = 8  # one step in eight has LONG sequences from the start: what is never seen beyond LENGTH is not learned in the last minutes
GUIDE, GUIDE_UNTIL = 1.0, 0.4  # the guide's weight, and the share of the run that has it in full; then a tenth of it
COPIES = 0.25  # the share of rows that are repeated random runs while the guide is on in full; then a quarter of it
WARMUP, DECAY_FROM, FLOOR = 0.01, 0.45, 0.03


@dataclass(frozen=True, slots=True)
class Run:
    """One pretraining run; exactly one of `hours` and `steps` ends it."""

    out: Path
    books: Path | None = None
    hours: float | None = None
    steps: int | None = None
    seed: int = 7
    tokens: int = TOKENS
    length: int = LENGTH
    long: int = LONG
    save_seconds: float = 120.0
    check_seconds: float = 600.0
    compile: bool = True
    packages: tuple[str, ...] | None = None
    budget: Budget = field(default_factory=Budget)
    shape: Shape = field(default_factory=Shape)


def rate(progress: float) -> float:
    """The learning rates' factor: a short warm-up, level, then linear down to FLOOR."""
    if progress < WARMUP:
        return max(0.05, progress / WARMUP)
    return 1.0 if progress < DECAY_FROM else FLOOR + (1 - FLOOR) * max(0.0, 1 - (progress - DECAY_FROM) / (1 - DECAY_FROM))


@dataclass(slots=True)
class State:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    spent: float = 0.0  # training seconds


def save_checkpoint(path: Path, model: SeedLM, optimizer: MuonAdamW, state: State) -> None:
    """Stage, fsync, rename."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()} | {
        f"optimizer.{k}": v for k, v in optimizer.state.items()
    }
    staged = path.with_suffix(".staged")
    save_file(tensors, staged, metadata={"step": str(state.step), "spent": repr(state.spent), "optimizer_steps": str(optimizer.steps)})
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    staged.replace(path)


@torch.no_grad()
def load_checkpoint(path: Path, model: SeedLM, optimizer: MuonAdamW) -> State:
    """Fill model and optimizer in place; a fresh State where there is no checkpoint."""
    if not path.exists():
        return State()
    with safe_open(path, "pt") as file:
        for name, p in model.named_parameters():
            p.copy_(file.get_tensor(f"model.{name}"))
        for key, value in optimizer.state.items():
            value.copy_(file.get_tensor(f"optimizer.{key}"))
        header = file.metadata()
    optimizer.steps = int(header["optimizer_steps"])
    return State(step=int(header["step"]), spent=float(header["spent"]))


def export(folder: Path, model: SeedLM, tokenizer: Tokenizer) -> None:
    """Write a transformers folder (bf16 safetensors, config, tokenizer, generation defaults), whole or not at all."""
    staged = folder.with_name(folder.name + ".staged")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, staged / "model.safetensors", metadata={"format": "pt"})
    (staged / "config.json").write_text(json.dumps(model.shape.config(), indent=2) + "\n", encoding="utf-8")
    generation = {"eos_token_id": [3, 0], "pad_token_id": 1, "do_sample": False}
    (staged / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, staged)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staged.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


class Pretraining:
    """Model, optimizer, data and clock of one run; `go` runs until the end or until `stop` is set."""

    def __init__(self, run: Run, *, report: Callable[[str], None] = print) -> None:
        if (run.hours is None) == (run.steps is None):
            raise ValueError("give exactly one of hours and steps")
        self.run, self.report, self.stop = run, report, False
        self.tokenizer = prepare(
            run.out / "data", books=run.books, budget=run.budget, packages=run.packages, vocab=run.shape.vocab, seed=run.seed
        )
        self.batches = Batches(run.out / "data", seed=run.seed)
        torch.manual_seed(run.seed)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = compute_dtype()  # of products; weights, sums and losses are float32
        self.model = SeedLM(run.shape).to(self.device)
        self.optimizer = MuonAdamW(self.model.named_parameters())
        self.checkpoint = run.out / "checkpoint.safetensors"
        self.state = load_checkpoint(self.checkpoint, self.model, self.optimizer)
        self.guide = 0.0
        self.loss: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = (
            torch.compile(self.model, dynamic=False) if run.compile else self.model
        )

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1."""
        done = self.state.step / self.run.steps if self.run.steps else self.state.spent / ((self.run.hours or 1.0) * 3600)
        return min(1.0, done)

    def one_step(self) -> float:
        """One update; gives its loss in nats."""
        run, progress = self.run, self.progress
        length = run.long if self.state.step % LONG_EVERY == LONG_EVERY - 1 else run.length
        guided = progress < GUIDE_UNTIL
        rows = max(1, run.tokens // length)
        ids, weights = self.batches.at(self.state.step, rows=rows, length=length, copies=COPIES if guided else COPIES / 4)
        tokens, sources = torch.from_numpy(ids).to(self.device), torch.from_numpy(copy_sources(ids)).to(self.device)
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            weighed = torch.from_numpy(weights).to(self.device)
            loss, guide = self.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weighed, sources)
        (loss + (GUIDE if guided else GUIDE / 10) * guide).backward()
        self.guide = float(guide.detach())
        self.optimizer.step(rate(progress))
        self.state.step += 1
        return float(loss.detach())

    def go(self) -> list[float]:
        """Train to the end, saving, checking and exporting on the way; gives the losses of this process's steps."""
        losses, marked = list[float](), self.state.step
        saved = checked = reported = time.monotonic()
        checked -= self.run.check_seconds - 240  # the first export comes early, for whoever waits for one
        while self.progress < 1 and not self.stop:
            began = time.monotonic()
            losses.append(self.one_step())
            now = time.monotonic()
            self.state.spent += min(now - began, 60.0)
            if now - reported > 20:
                self._say(losses, (self.state.step - marked) * self.run.tokens / (now - reported))
                reported, marked = now, self.state.step
            if now - saved > self.run.save_seconds:
                save_checkpoint(self.checkpoint, self.model, self.optimizer, self.state)
                saved = now
            if now - checked > self.run.check_seconds:
                self.publish(questions=100, rows=24)
                checked = now
        save_checkpoint(self.checkpoint, self.model, self.optimizer, self.state)
        return losses

    def publish(self, *, questions: int, rows: int) -> Scores:
        """Export to `out/export` and score on what was held out."""
        export(self.run.out / "export", self.model, self.tokenizer)
        scores = score(self.model, self.tokenizer, self.run.out / "data", questions=questions, rows=rows)
        step, done = self.state.step, self.progress >= 1
        facts = scores.as_dict() | {"step": step, "tokens": step * self.run.tokens, "seconds": round(self.state.spent), "finished": done}
        (self.run.out / "scores.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        data = json.loads((self.run.out / "data" / "data.json").read_text(encoding="utf-8"))
        parameters = sum(p.numel() for p in self.model.parameters())
        (self.run.out / "export" / "README.md").write_text(card(facts, data, self.model.shape, parameters=parameters), encoding="utf-8")
        self.report(f"check {json.dumps(facts)}")
        return scores

    def _say(self, losses: Sequence[float], speed: float) -> None:
        recent, left = losses[-20:], (1 / max(self.progress, 1e-6) - 1) * self.state.spent
        loss, tokens = sum(recent) / len(recent), self.state.step * self.run.tokens / 1e6
        self.report(
            f"step {self.state.step} progress {self.progress:.3f} loss {loss:.3f} guide {self.guide:.3f} tokens/s {speed:.0f} "
            f"tokens {tokens:.2f}M ETA {left / 60:.0f} min"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pretrain seed-lm; the same command resumes.")
    parser.add_argument("--books", type=Path, help="text file (or .xz), books separated by U+001E; without it only packages are read")
    parser.add_argument("--out", type=Path, required=True, help="working folder, outside the source tree")
    parser.add_argument("--hours", type=float, help="training hours in all, decay included")
    parser.add_argument("--steps", type=int, help="or: updates in all")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-compile", action="store_true")
    given = parser.parse_args(arguments)
    if (given.hours is None) == (given.steps is None):
        parser.error("give exactly one of --hours and --steps")
    torch.set_num_threads(given.threads)
    run = Run(out=given.out, books=given.books, hours=given.hours, steps=given.steps, seed=given.seed, compile=not given.no_compile)
    training = Pretraining(run, report=lambda line: print(line, flush=True))

    def stop(*_: object) -> None:
        training.stop = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    training.go()
    if training.stop:
        export(run.out / "export", training.model, training.tokenizer)
        print(f"stopped at step {training.state.step}: the same command goes on from there", flush=True)
    else:
        training.publish(questions=600, rows=160)


if __name__ == "__main__":
    main()
