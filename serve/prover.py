"""Runs serve.proving in a child process, one at a time, and turns how it ended into our errors."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from embedft.errors import AdapterInvalid, EngineBusy
from embedft.lean import EAGER
from serve.engine import Engine
from serve.supervisor import without_secrets

SECONDS = 600.0
MAX_WAITING = 8


class Prover:
    """`prove` and no second one beside it: it loads the base once more."""

    def __init__(self) -> None:
        self._one = asyncio.Lock()
        self._waiting = 0

    async def prove(self, kind: str, folder: Path, *, name: str, engine: Engine, members: list[tuple[Path, float]] | None = None) -> None:
        """Write probes and a passport into `folder`, for the base of `engine`. Raises AdapterInvalid, EngineBusy."""
        if self._waiting >= MAX_WAITING:
            raise EngineBusy(f"{self._waiting} adapters are waiting to be proven: come back shortly")
        job: dict[str, Any] = {"kind": kind, "folder": str(folder), "base": str(engine.folder), "task": engine.config.task, "name": name}
        job |= {"model": engine.public_model, "max_length": engine.max_length}
        job["members"] = [[str(member), weight] for member, weight in members or []]
        self._waiting += 1
        try:
            async with self._one:
                await self._run(name, job)
        finally:
            self._waiting -= 1

    async def _run(self, name: str, job: dict[str, Any]) -> None:
        env = without_secrets() | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **EAGER}
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "serve.proving", str(os.getpid()), stdin=pipe, stdout=pipe, stderr=pipe, env=env
        )
        try:
            async with asyncio.timeout(SECONDS):
                out, err = await child.communicate(json.dumps(job).encode())
        except BaseException as error:
            child.kill()
            await child.wait()
            if isinstance(error, TimeoutError):
                raise AdapterInvalid(name, f"its probes were not made within {SECONDS:.0f} s") from None
            raise
        if child.returncode:
            raise AdapterInvalid(name, _reason(out, err))


def _reason(out: bytes, err: bytes) -> str:
    try:
        return str(json.loads(out.splitlines()[-1])["message"])
    except (ValueError, KeyError, IndexError, TypeError):
        last = err.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it ended without a word"]
        return f"plain PEFT cannot load it: {last[0][:300]}"
