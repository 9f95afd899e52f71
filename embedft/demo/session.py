"""A server run as a user runs it (`embedft serve` in a process of its own), and what the demo asks of it over HTTP."""

import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import httpx

from embedft.errors import EngineFailed


class Server:
    """Context manager: `embedft serve` over a store, ready to answer. EngineFailed with the log's end where it does not start."""

    patience = 420.0

    def __init__(self, adapters: Path, *, engine: str | None, log: Path) -> None:
        self._adapters, self._engine, self._log = adapters, engine, log
        self.token = secrets.token_urlsafe(16)

    def __enter__(self) -> Self:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        argv = [sys.executable, "-m", "embedft", "serve", "--adapters", str(self._adapters), "--port", str(port)]
        argv += ["--engine", self._engine] if self._engine else []
        started = time.perf_counter()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, "EMBEDFT_ADMIN_TOKEN": self.token})
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        self._wait(started)
        self.ready_seconds = time.perf_counter() - started
        self.adapters: list[dict[str, Any]] = self.get("/v1/adapters")["data"]
        if refused := [f"{row['name']}: {reason}" for row in self.adapters if (reason := row.get("reason") or row.get("refused"))]:
            self.__exit__()
            raise EngineFailed("the server does not serve what was trained:\n" + "\n".join(refused))
        self.engines = {row["id"]: row["engine"] for row in self.get("/v1/models")["data"] if "engine" in row}
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str) -> dict[str, Any]:
        response = self.client.get(path, headers={"authorization": f"Bearer {self.token}"})
        response.raise_for_status()
        return response.json()

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        response = self.client.post(path, json=body)
        if response.is_error:
            raise EngineFailed(f"{path} answered {response.status_code}: {response.text[:300]}")
        return response.json()

    def names(self, task: str) -> list[str]:
        """The adapters over the base of that task."""
        return sorted(row["name"] for row in self.adapters if row["task"] == task)

    def base(self, task: str) -> str:
        return next(row["base"] for row in self.adapters if row["task"] == task)

    def parity(self) -> list[dict[str, Any]]:
        """Each adapter's probes as the engine answered them: the error of its effect against the trainer's."""
        return [{"adapter": row["name"], **row["probe"]} for row in self.adapters]

    def memory(self) -> int:
        """Proportional set size of the gateway and all its engines, in bytes."""
        import psutil

        root = psutil.Process(self.process.pid)
        return sum(process.memory_full_info().pss for process in [root, *root.children(recursive=True)])

    def _wait(self, started: float) -> None:
        while time.perf_counter() - started < self.patience:
            if self.process.poll() is not None:
                break
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        self.process.kill()
        raise EngineFailed(f"the server did not become ready; the end of its log:\n{self._log.read_text()[-2000:]}")


def ask(server: Server, *, query: str, prompt: str) -> dict[str, Any]:
    """The same query's vector, and the same prompt's answer, by the base, by A and by B."""
    embedding, lm = server.names("embedding"), server.names("causal_lm")
    vectors = {name: _vector(server, query, name) for name in [None, *embedding]}
    cosines = {str(name): sum(a * b for a, b in zip(vectors[None], vector, strict=True)) for name, vector in vectors.items() if name}
    answers = {name or "base": _answer(server, prompt, name) for name in [None, *lm]}
    return {"query": query, "cosine_to_base": cosines, "prompt": prompt, "answers": answers}


def switch_ms(server: Server, *, rounds: int = 40) -> dict[str, dict[str, float]]:
    """Median milliseconds of a request, the adapter the same as before and another than before, taken alternately."""
    figures: dict[str, dict[str, float]] = {}
    for task in ("embedding", "causal_lm"):
        a, b = server.names(task)[:2]
        same, switched = [], []
        for _ in range(rounds // 2):
            for one, other in ((a, b), (b, a)):
                _once(server, task, one)
                same.append(_once(server, task, one))
                switched.append(_once(server, task, other))
        figures[task] = {"same": statistics.median(same), "switched": statistics.median(switched)}
        figures[task]["cost"] = figures[task]["switched"] - figures[task]["same"]
    return figures


def _once(server: Server, task: str, adapter: str) -> float:
    started = time.perf_counter()
    if task == "embedding":
        _vector(server, "a short query", adapter)
    else:
        server.post("/v1/completions", model=server.base(task), adapter=adapter, prompt="def", max_tokens=1, temperature=0)
    return 1000 * (time.perf_counter() - started)


def _vector(server: Server, text: str, adapter: str | None) -> list[float]:
    body = server.post("/v1/embeddings", model=server.base("embedding"), adapter=adapter, input=text, input_type="query")
    return body["data"][0]["embedding"]


def _answer(server: Server, prompt: str, adapter: str | None) -> str:
    messages = [{"role": "user", "content": prompt}]
    body = server.post(
        "/v1/chat/completions", model=server.base("causal_lm"), adapter=adapter, messages=messages, max_tokens=16, temperature=0
    )
    return body["choices"][0]["message"]["content"].strip()
