"""A server under everything at once: zipf traffic, reloads, bad loads, cancelled streams, engines killed. Every answer is checked.

    python benchmarks/soak.py --engine peft --seconds 1800 --adapters 64

An answer is right when it equals what the adapter that the response names gives alone, in transformers + PEFT (vectors at cosine 0.9999
and nearer to no other adapter's; greedy tokens equal up to one whose lead is within 2 bf16 steps). The report goes to results/.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec, base_folder
from serve.proving import run as prove

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["sort a list in place", "x", "read a file line by line", "the committee met on Tuesday and put off its decision"]
PROMPTS = [[5, 9, 100, 33], [7] * 20, list(range(50, 90))]
TOKENS = 8
ADMIN = {"authorization": "Bearer soak"}


@dataclass
class World:
    """`solo[generation or 'base']`: vectors (texts, width), or per prompt (tokens, how many of them are beyond doubt)."""

    folder: Path
    store: AdapterStore
    bases: dict[str, Path]
    names: dict[str, list[str]]
    solo: dict[str, dict[str, Any]] = field(default_factory=dict)
    generations: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Report:
    sent: int = 0
    answered: int = 0
    cancelled: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str, **parts: Any) -> None:
        with self.lock:
            self.done[kind] += 1
            self.answered += parts.get("answered", 0)
            self.cancelled += parts.get("cancelled", 0)
            if parts.get("refused"):
                self.refused[parts["refused"]] += 1
            self.wrong += parts.get("wrong", [])
            self.lost += parts.get("lost", [])


def make_world(folder: Path, *, embedding: Path, language: Path, count: int, scale: float = 0.1) -> World:
    """`count` adapters over two bases, half each; the first of each half has two generations, to be swapped."""
    bases = {"texts": embedding, "words": language}
    world = World(folder, AdapterStore(folder / "adapters"), bases, {name: [] for name in bases})
    for number in range(count):
        base = ("texts", "words")[number % 2]
        name = f"{base}-{number // 2}"
        world.names[base].append(name)
        for turn in range(2 if number < 2 else 1):
            with world.store.stage() as stage:
                task = "embedding" if base == "texts" else "causal_lm"
                random_lora(stage, bases[base], task, seed=1000 * turn + number, scale=scale)
                prove({"kind": "import", "folder": str(stage), "base": str(bases[base]), "task": task, "name": name, "model": base})
                world.generations.setdefault(name, []).append(world.store.put(stage, name))
    for base in bases:
        solo_answers(world, base)
    return world


def random_lora(folder: Path, base: Path, task: Any, *, seed: int, scale: float) -> None:
    """A LoRA that changes much, as a trainer saves it."""
    import torch

    from embedft.base import load_base
    from embedft.methods import attach, save_weights
    from embedft.recipe import AdapterSection

    torch.manual_seed(seed)
    model = attach(load_base(BaseSpec(str(base)), task=task), AdapterSection(r=8, alpha=16), task=task)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=scale)
    save_weights(model, folder, base_name="soak")


def solo_answers(world: World, base: str) -> None:
    from embedft.base import load_model
    from embedft.methods import load_adapter

    folder, task = world.bases[base], "embedding" if base == "texts" else "causal_lm"
    own = [identity for name in world.names[base] for identity in world.generations[name]]
    world.solo[base] = {}
    for identity in ["base", *own]:
        model: Any = load_model(folder, task=task)  # type: ignore[arg-type]
        if identity != "base":
            model = load_adapter(model, world.store.folder(identity))
        world.solo[base][identity] = vectors(model, folder) if task == "embedding" else [greedy(model, prompt) for prompt in PROMPTS]


def vectors(model: Any, folder: Path) -> np.ndarray:
    from embedft.encode import Encoder, EncodeSettings
    from embedft.model_folder import describe

    info = describe(folder)
    return Encoder(model, folder, EncodeSettings(info.pooling, info.normalize, info.max_length)).encode(TEXTS)


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], int]:
    """(tokens, how many of them come before the first that was chosen by no more than 2 bf16 steps)."""
    import torch

    ids, sure = list(prompt), TOKENS
    for place in range(TOKENS):
        with torch.inference_mode():
            top = torch.topk(model(input_ids=torch.tensor([ids])).logits[0, -1].float(), 2)
        if float(top.values[0] - top.values[1]) <= 2 * 2.0**-7 * abs(float(top.values[0])):
            sure = min(sure, place)
        ids.append(int(top.indices[0]))
    return ids[len(prompt) :], sure


class Soak:
    """Traffic and trouble against one running server until `seconds` are over."""

    def __init__(self, world: World, url: str, process: int, *, seconds: float, workers: int, kill_every: float, seed: int = 0) -> None:
        self.world, self.url, self.process = world, url, process
        self.until, self.workers, self.kill_every, self.seed = time.monotonic() + seconds, workers, kill_every, seed
        self.report = Report()

    def run(self) -> Report:
        jobs = [threading.Thread(target=self._traffic, args=(number,)) for number in range(self.workers)]
        jobs += [threading.Thread(target=job) for job in (self._reloads, self._kills, self._memory)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        return self.report

    def _traffic(self, number: int) -> None:
        choice = random.Random(self.seed * 1000 + number)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while time.monotonic() < self.until:
                base = choice.choice(["texts", "words"])
                name = _zipf(choice, self.world.names[base]) if choice.random() > 0.1 else None
                with self.report.lock:
                    self.report.sent += 1
                try:
                    if base == "texts":
                        self._embed(client, name, choice)
                    else:
                        self._complete(client, name, choice)
                except httpx.TransportError as error:
                    self.report.count("traffic", lost=[f"{type(error).__name__}: {error}"])

    def _embed(self, client: httpx.Client, name: str | None, choice: random.Random) -> None:
        rows = [choice.randrange(len(TEXTS)) for _ in range(choice.choice([1, 1, 3]))]
        answer = client.post("/v1/embeddings", json={"model": "texts", "adapter": name, "input": [TEXTS[row] for row in rows]})
        if answer.status_code != 200:
            self.report.count("embed", **_refusal(answer))
            return
        made_by = self._made_by(answer.headers["x-embedft-adapter"], name)
        wrong = [] if made_by else [f"{name} answered by {answer.headers['x-embedft-adapter']}"]
        for row, item in zip(rows, answer.json()["data"], strict=True):
            cosines = {key: float(np.dot(solo[row], item["embedding"])) for key, solo in self.world.solo["texts"].items()}
            best = max(cosines, key=lambda key: cosines[key])
            if made_by and (best != made_by or cosines[best] < 0.9999):
                wrong.append(f"{name}: nearest to {best[:12]} at {cosines[best]:.5f}")
        self.report.count("embed", answered=1, wrong=wrong)

    def _complete(self, client: httpx.Client, name: str | None, choice: random.Random) -> None:
        row, kind = choice.randrange(len(PROMPTS)), choice.choice(["whole", "stream", "cancelled"])
        body = {"model": "words", "adapter": name, "prompt": PROMPTS[row], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": 0, "stream": kind != "whole", "skip_special_tokens": False}
        if kind == "whole":
            answer = client.post("/v1/completions", json={key: value for key, value in body.items() if key in ACCEPTED})
            if answer.status_code != 200:
                self.report.count(kind, **_refusal(answer))
                return
            self._check(kind, name, row, answer.headers, answer.json()["choices"][0]["logprobs"]["tokens"])
            return
        with client.stream("POST", "/v1/completions", json={key: value for key, value in body.items() if key in ACCEPTED}) as answer:
            if answer.status_code != 200:
                answer.read()
                self.report.count(kind, **_refusal(answer))
                return
            words: list[str] = []
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    self._check(kind, name, row, answer.headers, words)
                    return
                event = json.loads(line[6:])
                if "error" in event:
                    self.report.count(kind, refused=event["error"]["code"])
                    return
                words += [word for part in event["choices"] for word in (part.get("logprobs") or {}).get("tokens", [])]
                if kind == "cancelled" and words:
                    self.report.count(kind, cancelled=1)
                    return
        self.report.count(kind, lost=["a stream ended without [DONE] and without an error"])

    def _check(self, kind: str, name: str | None, row: int, headers: httpx.Headers, words: list[str]) -> None:
        made_by = self._made_by(headers["x-embedft-adapter"], name)
        if made_by is None:
            self.report.count(kind, answered=1, wrong=[f"{name} answered by {headers['x-embedft-adapter']}"])
            return
        tokens, sure = self.world.solo["words"][made_by][row]
        expected = [self._word(token) for token in tokens]
        wrong = [] if words[:sure] == expected[:sure] and len(words) == TOKENS else [f"{name}: {words} where alone {expected}"]
        self.report.count(kind, answered=1, wrong=wrong)

    def _word(self, token: int) -> str:
        if not hasattr(self, "_tokenizer"):
            from transformers import AutoTokenizer

            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.world.bases["words"])
        return str(self._tokenizer.decode([token]))

    def _made_by(self, header: str, name: str | None) -> str | None:
        """The generation that the response names, if it is one of the name that was asked for."""
        plain, _, digits = header.partition("@")
        if name is None:
            return "base" if header == "base" else None
        return next((one for one in self.world.generations[name] if plain == name and digits and one.startswith(digits)), None)

    def _reloads(self) -> None:
        """Generations swapped, and damaged adapters offered: the one must succeed or be refused with reason, the other be refused."""
        turn = 0
        with httpx.Client(base_url=self.url, timeout=120, headers=ADMIN) as client:
            while time.monotonic() < self.until:
                turn += 1
                for base in self.world.names:
                    name = self.world.names[base][0]
                    source = self.world.generations[name][turn % 2]
                    answer = client.put(f"/v1/adapters/{name}", json={"source": source})
                    self.report.count("reload" if answer.status_code == 200 else f"reload refused: {answer.json()['error']['code']}")
                    other = self.world.names["words" if base == "texts" else "texts"][0]
                    bad = client.put(
                        f"/v1/adapters/{name}", json={"source": self.world.generations[other][0], "expected_generation": "0" * 12}
                    )
                    foreign = client.put(f"/v1/adapters/{name}x", json={"source": "../" + source})
                    wrong = [f"a bad load was taken: {one.text}" for one in (bad, foreign) if one.status_code == 200]
                    self.report.count("bad load", wrong=wrong)
                time.sleep(1)

    def _kills(self) -> None:
        due, which = time.monotonic() + self.kill_every, 0
        while time.monotonic() < self.until:
            time.sleep(0.2)
            if time.monotonic() >= due and due < self.until - 1:
                engines = [one for one in psutil.Process(self.process).children(recursive=True) if _is_engine(one)]
                if engines:
                    os.kill(engines[which % len(engines)].pid, signal.SIGKILL)
                    self.report.count("kill")
                due, which = due + self.kill_every, which + 1

    def _memory(self) -> None:
        while time.monotonic() < self.until:
            process = psutil.Process(self.process)
            total = 0
            for one in [process, *process.children(recursive=True)]:
                try:
                    total += one.memory_full_info().pss
                except psutil.Error:
                    continue
            self.report.memory.append((time.monotonic(), total))
            time.sleep(1)


ACCEPTED = {"model", "adapter", "prompt", "max_tokens", "temperature", "ignore_eos", "logprobs", "stream"}


def _is_engine(process: psutil.Process) -> bool:
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    return any(part.startswith("serve.engines") for part in line) and "guard.py" not in " ".join(line[:4])


def _zipf(choice: random.Random, names: list[str]) -> str:
    return choice.choices(names, [1 / (rank + 1) for rank in range(len(names))])[0]


def _refusal(answer: httpx.Response) -> dict[str, Any]:
    code = answer.json()["error"]["code"]
    expected = answer.status_code in (429, 503)
    return {"refused": code} if expected else {"refused": code, "wrong": [f"{answer.status_code} {answer.text[:200]}"]}


def summary(report: Report, *, seconds: float) -> dict[str, Any]:
    """What the report says, in plain figures."""
    points = report.memory[len(report.memory) // 3 :]
    slope = np.polyfit([at for at, _ in points], [size for _, size in points], 1)[0] * 60 if len(points) > 2 else 0.0
    return {
        "seconds": seconds,
        "sent": report.sent,
        "answered": report.answered,
        "cancelled": report.cancelled,
        "refused": dict(report.refused),
        "wrong": len(report.wrong),
        "lost": len(report.lost),
        "done": dict(report.done),
        "memory_mib": round(points[-1][1] / 2**20) if points else None,
        "memory_slope_mib_a_minute": round(float(slope) / 2**20, 2),
        "examples": [*report.wrong[:5], *report.lost[:5]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("peft", "vllm"), default="peft")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--slots", type=int, default=None)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=300)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.serve.world import launch

    with tempfile.TemporaryDirectory(prefix="soak-") as home:
        folders = {"embedding": base_folder(BaseSpec("minilm")), "language": base_folder(BaseSpec("seed-lm"))}
        world = make_world(Path(home), count=arguments.adapters, **folders)
        tasks = {"texts": "embedding", "words": "causal_lm"}
        bases = [
            {"name": name, "model": str(folder), "task": tasks[name], "engine": arguments.engine, "slots": arguments.slots}
            for name, folder in world.bases.items()
        ]
        server = launch(
            {"bases": bases, "access_log": False}, folder=world.folder, store=world.store.root, env={"EMBEDFT_ADMIN_TOKEN": "soak"}
        )
        server.wait_ready(600)
        soak = Soak(
            world, server.url, server.process.pid, seconds=arguments.seconds, workers=arguments.workers, kill_every=arguments.kill_every
        )
        found = {"engine": arguments.engine, "adapters": arguments.adapters, **summary(soak.run(), seconds=arguments.seconds)}
        found["stopped"] = server.stop()
    out = arguments.out or RESULTS / f"soak-{arguments.engine}.json"
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 1 if found["wrong"] or found["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
