"""A small world for the gateway: bases without a model, adapters that the fake engine obeys, a real server process over them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from embedft.adapters.passport import BaseIdentity, Passport, ProbeRecord
from embedft.adapters.probes import Probe, RecordedProbes, write_probes
from embedft.adapters.store import AdapterStore
from embedft.model_folder import fingerprint

ROOT = Path(__file__).resolve().parents[2]
DIMENSION, LENGTH, TOKEN = 32, 64, "test-admin"
ADMIN = {"authorization": f"Bearer {TOKEN}"}


def write_base(folder: Path, *, seed: int, decoder: bool = False) -> Path:
    """A base folder of a few bytes: one token a character, at most LENGTH tokens."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    architecture = "LlamaForCausalLM" if decoder else "BertModel"
    config = {"architectures": [architecture], "hidden_size": DIMENSION, "max_position_embeddings": LENGTH, "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": np.random.default_rng(seed).standard_normal(4).astype(np.float32)}, str(folder / "model.safetensors"))
    return folder


def put_adapter(store: AdapterStore, name: str, base: Path, *, seed: int, scale: float = 1.0, **passport: Any) -> str:
    """An adapter in the store; its generation. `scale` ≠ 1: the engine shows another effect than was recorded."""
    task = passport.pop("task", "embedding")
    with store.stage() as folder:
        fill_adapter(folder, name, base, seed=seed, scale=scale, task=task, **passport)
        return store.put(folder, name)


def fill_adapter(folder: Path, name: str, base: Path, *, seed: int, scale: float, task: str, **passport: Any) -> None:
    random = np.random.default_rng(seed)
    save_file({"lora_A": random.standard_normal((2, 4)).astype(np.float32)}, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "fake_scale": scale}))
    probes, effects = [], []
    for number in range(4):
        ids = tuple(int(token) for token in random.integers(1, 200, size=6 + number))
        continuation = () if task == "embedding" else (5, 6, 7)
        probes.append(Probe(ids, continuation))
        effects.append(random.standard_normal(DIMENSION if task == "embedding" else 3).astype(np.float32))
    write_probes(folder, RecordedProbes(tuple(probes), (), tuple(effects), {}, 0.1))
    embedding = {"pooling": "mean", "normalize": True} if task == "embedding" else {}
    settings: dict[str, Any] = {"max_length": LENGTH, "r": 2, **embedding, **passport}
    Passport(
        name=name,
        task=task,  # pyright: ignore[reportArgumentType]
        base=BaseIdentity(model=str(base), fingerprint=fingerprint(base)),
        method="lora",
        alpha=4,
        probes=ProbeRecord(kind=task, count=4, tolerance=0.1),  # pyright: ignore[reportArgumentType]
        **settings,
    ).write(folder)


@dataclass
class Server:
    """A running `embedft serve`: `events` are what the fake engines wrote down."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    events_file: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.events_file.read_text().splitlines()] if self.events_file.exists() else []
        return [row for row in rows if kind in (None, row["event"])]

    def logged(self, identity: str) -> dict[str, Any]:
        """The one line of the access log that a request has."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        (found,) = [line for line in lines if line["id"] == identity]
        return found

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def put(self, name: str, body: Any | None = None) -> httpx.Response:
        return self.client.put(f"/v1/adapters/{name}", json=body or {}, headers=ADMIN)

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_ready(self, seconds: float = 60) -> None:
        try:
            wait_for(lambda: self.client.get("/ready").status_code == 200, seconds, self)
        except BaseException:
            self.process.kill()
            raise

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=30)
        self.client.close()
        return status


def wait_for(condition: Any, seconds: float = 15, server: Server | None = None) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        if server and server.process.poll() is not None:
            raise AssertionError(f"the server ended: {server.log.read_text()}")
        assert time.monotonic() < until, server.log.read_text() if server else "waited in vain"
        time.sleep(0.05)


@dataclass
class World:
    """Two bases (`texts` embeds, `words` generates) and a store that both draw from."""

    folder: Path
    texts: Path
    words: Path
    store: AdapterStore

    def start(
        self, *, wait: bool = True, latency: float | str = 0.0, token_latency: float = 0.0, base: Any = None, **config: Any
    ) -> Server:
        bases = [
            {"name": "texts", "model": str(self.texts), "task": "embedding", "engine": "fake", **(base or {})},
            {"name": "words", "model": str(self.words), "task": "causal_lm", "engine": "fake", **(base or {})},
        ]
        events = self.folder / "events.jsonl"
        env = {"EMBEDFT_FAKE_EVENTS": str(events), "EMBEDFT_FAKE_LATENCY": str(latency), "EMBEDFT_FAKE_TOKEN_LATENCY": str(token_latency)}
        server = launch({"bases": bases, "stop_seconds": 3.0, **config}, folder=self.folder, store=self.store.root, env=env)
        if wait:
            server.wait_ready()
        return server


Start = Callable[..., Server]  # the fixture's


def launch(config: dict[str, Any], *, folder: Path, store: Path, env: dict[str, str] | None = None) -> Server:
    """`embedft serve` in a process of its own, as a user starts it; it has said where it listens, no more."""
    path, log, events = folder / "server.yaml", folder / "server.log", folder / "events.jsonl"
    path.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "EMBEDFT_ADMIN_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), **(env or {})}
    command = [sys.executable, "-m", "embedft", "serve", str(path), "--port", "0", "--adapters", str(store)]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stderr=file, stdout=file, text=True, cwd=folder)
    wait_for(lambda: "http://" in log.read_text() or process.poll() is not None, 60)
    found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
    assert found, log.read_text()
    return Server(process, found[0], log, events)


def make_rag_world(folder: Path) -> World:
    """With `q2`, a second adapter for queries only: it shares an index with `q`."""
    world = make_world(folder)
    put_adapter(world.store, "q2", world.texts, seed=20, side="query")
    return world


def make_world(folder: Path) -> World:
    """Bases, and adapters: `a`, `b` (embedding, with prompts on b), `q` (query only), `s` and `t` (language model)."""
    texts, words = write_base(folder / "texts", seed=1), write_base(folder / "words", seed=2, decoder=True)
    world = World(folder, texts, words, AdapterStore(folder / "adapters"))
    put_adapter(world.store, "a", texts, seed=10, dimensions=(8,))
    put_adapter(world.store, "b", texts, seed=11, prompts={"query": "ask: ", "document": ""}, max_length=20)
    put_adapter(world.store, "q", texts, seed=12, side="query")
    put_adapter(world.store, "s", words, seed=13, task="causal_lm")
    put_adapter(world.store, "t", words, seed=14, task="causal_lm")
    return world
