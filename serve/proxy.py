"""Calls to one engine over its link: whole answers, streams, load and unload. Turns every failure into one of our errors.

Knows vLLM's routes and nothing of names, generations or tenants.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json, to_json

from embedft.errors import AdapterInvalid, EngineBusy, EngineFailed
from serve.engines import vectors
from serve.errors import EngineRejected, NotReady
from serve.link.gateway import Link, Reply

LOAD_SECONDS = 300.0
UNLOAD_SECONDS = 10.0
HEALTH_SECONDS = 5.0
_CODE = re.compile(r"[a-z][a-z0-9_]{2,63}")


class EngineLacks(EngineBusy):
    """It does not have what the request names: an adapter that is on its way out, or in."""


class EngineClient:
    """Calls to the engine at `socket`. `name` is the base's, for messages. Use it from one event loop."""

    def __init__(self, name: str, socket: Path, key: str) -> None:
        self.name = name
        self._link = Link(str(socket), key)

    def close(self) -> None:
        self._link.close()

    async def healthy(self) -> bool:
        try:
            async with asyncio.timeout(HEALTH_SECONDS), self._link.call("/health", b"", method="GET") as reply:
                return reply.status == 200
        except OSError:  # a TimeoutError is one
            return False

    async def call(self, path: str, body: Mapping[str, Any], *, timeout: float | None = None) -> Any:
        """The parsed answer. Raises EngineRejected, EngineBusy, EngineFailed or NotReady."""
        return from_json(await self._answer(path, body, timeout))

    async def vectors(self, model: str, ids: Sequence[Sequence[int]], *, timeout: float | None = None) -> NDArray[np.float32]:
        """(n,) token ids → (n, d) as the engine makes them. Raises as `call` does."""
        return vectors.unpacked(await self._answer(vectors.PATH, {"model": model, "input": ids}, timeout), len(ids))

    async def load(self, adapter: str, folder: Path) -> None:
        """Load an adapter folder as `adapter`. AdapterInvalid with the engine's reason where it will not take it."""
        try:
            await self._done("/v1/load_lora_adapter", {"lora_name": adapter, "lora_path": str(folder)})
        except NotReady:
            raise
        except (EngineRejected, EngineFailed, EngineBusy) as error:
            raise AdapterInvalid(adapter.partition("@")[0], f"the engine refused it: {error}") from None

    async def unload(self, adapter: str) -> None:
        """Unload; an adapter that is not loaded is no error. One that still works for a client who has gone is waited for.

        Raises EngineBusy where that takes longer than UNLOAD_SECONDS.
        """
        until = time.monotonic() + UNLOAD_SECONDS
        while True:
            try:
                await self._done("/v1/unload_lora_adapter", {"lora_name": adapter})
                return
            except (EngineRejected, EngineLacks):
                return
            except NotReady:
                raise
            except EngineBusy:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.05)

    async def _done(self, path: str, body: Mapping[str, Any]) -> None:
        await self._answer(path, body, LOAD_SECONDS)

    async def _answer(self, path: str, body: Mapping[str, Any], timeout: float | None) -> bytes:
        try:
            async with asyncio.timeout(timeout), self._link.call(path, to_json(body)) as reply:
                status, content = reply.status, await reply.read()
        except TimeoutError:
            raise EngineFailed(f"the engine of base {self.name!r} did not answer in time") from None
        except OSError:
            raise self._away() from None
        self._check(status, content)
        return content

    @asynccontextmanager
    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[AsyncIterator[list[bytes]]]:
        """The answer's server-sent events (`data: ` cut off), those together that came so. Leaving the block cancels what runs upstream."""
        async with AsyncExitStack() as stack:
            try:
                reply = await stack.enter_async_context(self._link.call(path, to_json(body)))
                if reply.status != 200:
                    self._check(reply.status, await reply.read())
            except OSError:
                raise self._away() from None
            yield self._events(reply)

    async def _events(self, reply: Reply) -> AsyncIterator[list[bytes]]:
        rest = b""
        try:
            async for part in reply.parts():
                *lines, rest = (rest + part).split(b"\n")  # bytes: a str would also split at U+2028 inside JSON
                if events := [line[5:].strip() for line in lines if line.startswith(b"data:")]:
                    yield events
        except OSError:
            raise NotReady(f"the engine of base {self.name!r} went away in mid-answer") from None

    def _away(self) -> NotReady:
        return NotReady(f"the engine of base {self.name!r} went away: try again shortly")

    def _check(self, status: int, content: bytes) -> None:
        if status == 200:
            return
        message, code, param = _reason(content)
        if status == 404:  # in no words of the engine's: they may name what others have loaded
            raise EngineLacks(f"the engine of base {self.name!r} does not have what was asked of it just now: try again shortly")
        if status in (400, 413, 422):
            raise EngineRejected(message, code=code, param=param)
        if status in (429, 503):
            raise EngineBusy(f"the engine of base {self.name!r} is busy: {message}")
        raise EngineFailed(f"the engine of base {self.name!r} answered {status}: {message}")


def _reason(content: bytes) -> tuple[str, str | None, str | None]:
    """(message, code, param) of an error body, whichever of vLLM's shapes it has."""
    try:
        body = from_json(content)
    except ValueError:
        return content[:300].decode("utf-8", "replace"), None, None
    if isinstance(body, dict):
        found: dict[str, Any] = body["error"] if isinstance(body.get("error"), dict) else body
        code, param = found.get("code"), found.get("param")
        message = str(found.get("message") or found.get("detail") or body)[:2000]
        stable = code if isinstance(code, str) and _CODE.fullmatch(code) else None
        return message, stable, param if isinstance(param, str) else None
    return str(body)[:300], None, None
