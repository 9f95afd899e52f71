"""The `peft` engine of this repository as one more way: the real server, asked over its socket by as many clients as are in flight."""

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.sharing.workload import Request


class PeftEngine:
    """Started and healthy; `process` is the engine's own."""

    def __init__(self, mode: str, base: Path, task: Any) -> None:
        import httpx

        from serve.engines.command import engine_command
        from serve.engines.settings import KEY, EngineSettings

        del mode
        self.task, self.names = task, list[str]()
        socket = Path(tempfile.mkdtemp(prefix="share-")) / "e.sock"
        argv, env = engine_command("peft", folder=base, task=task, socket=socket, settings=EngineSettings(max_loras=128))
        self.process = subprocess.Popen(argv, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        headers = {"authorization": f"Bearer {env[KEY]}"}
        self.client = httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://engine", headers=headers, timeout=300)
        while self.process.poll() is None:
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise RuntimeError("the peft engine did not start")

    def register(self, folders: Sequence[Path]) -> None:
        for folder in folders:
            self._post("/v1/load_lora_adapter", lora_name=f"a{folder.name}", lora_path=str(folder))
            self.names.append(f"a{folder.name}")

    def run(self, requests: Sequence[Request], *, flight: int, tokens: int) -> list[tuple[float, float | None, float]]:
        start = time.perf_counter()

        def ask(request: Request) -> tuple[float, float | None, float]:
            time.sleep(max(0.0, request.arrival - (time.perf_counter() - start)))
            begun = request.arrival or time.perf_counter() - start
            model = "base" if request.adapter is None else self.names[request.adapter]
            first = None
            if self.task == "embedding":
                self._post("/v1/embeddings", model=model, input=[request.ids])
            else:
                first = self._stream(model=model, prompt=request.ids, max_tokens=tokens, temperature=0, ignore_eos=True) - start
            return begun, first, time.perf_counter() - start

        with ThreadPoolExecutor(flight) as pool:
            return list(pool.map(ask, requests))

    def _post(self, path: str, **body: Any) -> None:
        answer = self.client.post(path, json=body)
        if answer.status_code != 200:
            raise RuntimeError(f"{path}: {answer.text}")

    def _stream(self, **body: Any) -> float:
        """When the first token came, by the clock."""
        with self.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"/v1/completions: {answer.read().decode()}")
            parts = answer.iter_bytes()
            next(parts)
            first = time.perf_counter()
            whole = b"".join(parts)
        if b"[DONE]" not in whole:
            raise RuntimeError("/v1/completions: a stream broke off")
        return first
