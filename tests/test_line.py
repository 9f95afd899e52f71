"""The whole line with nothing replaced: adapters trained here, served by vLLM over two NF4 bases behind the gateway."""

import itertools
import json
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.gateway import direct
from benchmarks.soaking.traffic import rest_together
from embedft.adapters.passport import PASSPORT, WEIGHTS
from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec
from tests.line import PROMPTS, QUERIES, TOKENS, Solo, solo_answers, solo_vectors, train_causal_lm, train_embedding
from tests.serve.engine_process import assert_short_way_to_vectors
from tests.serve.world import Server, launch

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
SECONDS = 60.0
REST = 2.0  # seconds without new requests after each second of them: the other tests' cores
WORKERS, TURNS = 5, 2  # how many send; how often each of them sends every kind of request, however slow the machine
TEXT, WORDS = BaseSpec("minilm", "nf4"), BaseSpec("seed-lm", "nf4")
EMBEDDING, LANGUAGE = ("a", "b"), ("s", "t")
KINDS: list[tuple[str, str | None]] = [
    ("mixed", None),
    *(("embed", name) for name in (None, *EMBEDDING)),
    *((kind, name) for kind in ("chat", "stream") for name in (None, *LANGUAGE)),
]


@dataclass
class Line:
    """A running server; `generations[name]` are that name's, the last one serving; `vectors` and `answers` are solo, by generation."""

    server: Server
    store: AdapterStore
    folder: Path
    generations: dict[str, list[str]]
    vectors: dict[str, np.ndarray]
    answers: dict[str, list[Solo]]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    folder = tmp_path_factory.mktemp("line")
    store = AdapterStore(folder / "adapters")
    base = {"model": "minilm", "quantization": "nf4"}, {"model": "seed-lm", "quantization": "nf4"}
    generations = {
        "a": [train_embedding(store, "a", folder / "data", seed=seed, **base[0]) for seed in (1, 2)],
        "b": [train_embedding(store, "b", folder / "data", seed=3, **base[0])],
        "s": [train_causal_lm(store, "s", folder / "data", seed=seed, **base[1]) for seed in (1, 2)],
        "t": [train_causal_lm(store, "t", folder / "data", seed=3, **base[1])],
    }
    vectors = {identity: solo_vectors(store, identity, spec=TEXT) for name in EMBEDDING for identity in generations[name]}
    answers = {identity: solo_answers(store, identity, spec=WORDS) for name in LANGUAGE for identity in generations[name]}
    config = {
        "bases": [
            {"name": "minilm", **base[0], "task": "embedding", "engine": "vllm", "max_loras": 4},
            {"name": "seed-lm", **base[1], "task": "causal_lm", "engine": "vllm", "max_loras": 4},
        ]
    }
    server = launch(config, folder=folder, store=store.root)
    server.wait_ready(300)
    vectors["base"], answers["base"] = solo_vectors(store, None, spec=TEXT), solo_answers(store, None, spec=WORDS)
    yield Line(server, store, folder, generations, vectors, answers)
    processes = server.processes()
    assert server.stop() == 0
    assert not [process for process in processes if process.is_running()], "the server left a process behind"


def test_the_solo_answers_are_far_enough_apart_that_a_swap_shows(line: Line) -> None:
    for one, other in itertools.combinations(line.vectors.values(), 2):
        assert (one * other).sum(1).max() < 0.999
    for one, other in itertools.combinations(line.answers.values(), 2):
        assert not any(left.equals(right.text) for left, right in zip(one, other, strict=True)), (one, other)


def test_each_adapter_shows_the_trainers_effect_in_vllm(line: Line) -> None:
    listed = {row["name"]: row for row in line.server.client.get("/v1/adapters").json()["data"]}
    assert set(listed) == {*EMBEDDING, *LANGUAGE}
    for row in listed.values():
        assert row["state"] == "serving"
        assert row["probe"]["passed"]
        assert row["probe"]["error"] < 0.01


def test_the_gateways_short_way_to_vectors_gives_what_vllms_own_route_gives(line: Line) -> None:
    with direct(line.server.process.pid, "embedding")() as engine:
        adapters = [row["id"] for row in engine.get("/v1/models").json()["data"] if row.get("parent")]
        assert len(adapters) >= 2
        assert_short_way_to_vectors(engine, ["base", *adapters], [[101, 2129, 102], [101, *range(2000, 2040), 102]], longest=512)


Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
DAMAGE: dict[str, Change] = {
    "one module type zeroed": lambda tensors: _changed(
        tensors, lambda name, value: value * 0 if "down_proj" in name or "output.dense" in name else value
    ),
    "all scaled by 0.8": lambda tensors: _changed(
        tensors, lambda name, value: value * value.dtype.type(0.8) if "lora_B" in name else value
    ),
    "a no-op": lambda tensors: _changed(tensors, lambda name, value: value * 0 if "lora_B" in name else value),
}


def _changed(tensors: dict[str, np.ndarray], change: Callable[[str, np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    return {name: change(name, value) for name, value in tensors.items()}


@pytest.mark.parametrize("name", ["b", "t"])
@pytest.mark.parametrize("damage", [*DAMAGE, "trained on another base"])
def test_a_damaged_adapter_is_refused_and_the_good_one_goes_on(line: Line, damage: str, name: str) -> None:
    with line.store.stage() as stage:
        shutil.copytree(line.store.folder(line.generations[name][-1]), stage, dirs_exist_ok=True)
        if damage in DAMAGE:
            save_file(DAMAGE[damage](load_file(stage / WEIGHTS)), stage / WEIGHTS)
        else:
            passport = json.loads((stage / PASSPORT).read_text())
            passport["base"]["fingerprint"] = "0" * 64
            (stage / PASSPORT).write_text(json.dumps(passport))
        identity = line.store.add(stage)
    refused = line.server.put(name, {"source": identity})
    assert refused.status_code == (422 if damage in DAMAGE else 409), refused.text
    assert refused.json()["error"]["code"] == ("probes_failed" if damage in DAMAGE else "base_mismatch")
    answer = _embed(line, name, [0]) if name in EMBEDDING else _chat(line, name, 0, stream=False)
    assert answer == (name, line.generations[name][-1])


def test_mixed_traffic_with_hot_reloads_is_answered_by_the_right_adapter_and_in_full(line: Line) -> None:
    """Base, A and B over both bases, alone and mixed in one request, streamed and not, while A's generations change."""
    until = time.monotonic() + SECONDS
    sent: Counter[str] = Counter()
    lock = threading.Lock()
    over = threading.Event()

    def traffic(seed: int) -> None:
        choice = random.Random(seed)
        turns = 0
        while turns < TURNS or time.monotonic() < until:
            for kind, name in choice.sample(KINDS, len(KINDS)):
                rest_together(REST)
                rows = choice.sample(range(len(QUERIES)), 3)
                if kind == "embed":
                    _embed(line, name, rows)
                elif kind == "mixed":
                    _mixed(line, [choice.choice([None, *EMBEDDING]) for _ in rows], rows)
                else:
                    _chat(line, name, choice.randrange(len(PROMPTS)), stream=kind == "stream")
                with lock:
                    sent[f"{kind} {name}"] += 1
            turns += 1

    with ThreadPoolExecutor(WORKERS + 1) as pool:
        workers = [pool.submit(traffic, seed) for seed in range(WORKERS)]
        reloads = pool.submit(_reload, line, over)
        try:
            for worker in workers:
                worker.result()
        finally:
            over.set()
        assert reloads.result() >= 10
    assert len(sent) == len(KINDS)
    assert min(sent.values()) >= WORKERS * TURNS, sent


def _reload(line: Line, over: threading.Event) -> int:
    """Point A of both bases at its one generation and its other, in turn, at least five times; how often."""
    turns = 0
    while not over.wait(REST) or turns < 5:
        for name in ("a", "s"):
            answer = line.server.put(name, {"source": line.generations[name][turns % 2]})
            assert answer.status_code == 200, answer.text
        turns += 1
    return 2 * turns


def _embed(line: Line, name: str | None, rows: list[int]) -> tuple[str, str]:
    """(name, generation) that made the vectors: what the header says, and what the vectors prove."""
    body = {"model": "minilm", "adapter": name, "input": [QUERIES[row] for row in rows], "input_type": "query"}
    answer = line.server.post("/v1/embeddings", body, timeout=120)
    assert answer.status_code == 200, answer.text
    said, identity = _said(line, answer.headers["x-embedft-adapter"])
    assert said == (name or "base")
    for row, item in zip(rows, answer.json()["data"], strict=True):
        assert _made_by(line, item["embedding"], row) == identity
    return said, identity


def _mixed(line: Line, names: list[str | None], rows: list[int]) -> None:
    body = {"model": "minilm", "adapter": names, "input": [QUERIES[row] for row in rows], "input_type": "query"}
    answer = line.server.post("/v1/embeddings", body, timeout=120)
    assert answer.status_code == 200, answer.text
    for name, row, item in zip(names, rows, answer.json()["data"], strict=True):
        assert _made_by(line, item["embedding"], row) in (line.generations[name] if name else ["base"])


def _made_by(line: Line, vector: list[float], row: int) -> str:
    """The one solo vector that this is, at cosine 0.9999 or more."""
    cosines = {identity: float(np.dot(vectors[row], vector)) for identity, vectors in line.vectors.items()}
    best = max(cosines, key=lambda identity: cosines[identity])
    assert cosines[best] >= 0.9999, cosines
    return best


def _chat(line: Line, name: str | None, prompt: int, *, stream: bool) -> tuple[str, str]:
    body = {"model": "seed-lm", "adapter": name, "messages": [{"role": "user", "content": PROMPTS[prompt]}]}
    body |= {"max_tokens": TOKENS, "temperature": 0, "stream": stream}
    text, headers = _streamed(line, body) if stream else _whole(line, body)
    said, identity = _said(line, headers["x-embedft-adapter"])
    assert said == (name or "base")
    assert line.answers[identity][prompt].equals(text), (said, text, line.answers[identity][prompt])
    return said, identity


def _whole(line: Line, body: dict[str, Any]) -> tuple[str, httpx.Headers]:
    answer = line.server.post("/v1/chat/completions", body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"], answer.headers


def _streamed(line: Line, body: dict[str, Any]) -> tuple[str, httpx.Headers]:
    with line.server.client.stream("POST", "/v1/chat/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        events = [row.removeprefix("data: ") for row in answer.iter_lines() if row]
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    assert choices[-1]["finish_reason"] in {"stop", "length"}
    return "".join(choice["delta"].get("content") or "" for choice in choices), answer.headers


def _said(line: Line, header: str) -> tuple[str, str]:
    """'a@3f9c…' → (a, its whole generation); 'base' stands for itself."""
    name, _, short = header.partition("@")
    if not short:
        return "base", "base"
    return name, next(identity for identity in line.generations[name] if identity.startswith(short))
