"""Calls to one engine over its Unix socket: whole answers, streams, load and unload. Turns every failure into one of our errors.

Knows vLLM's HTTP and nothing of names, generations or tenants.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from pydantic_core import from_json, to_json

from embedft.errors import AdapterInvalid, EngineBusy, EngineFailed
from serve.errors import EngineRejected, NotReady

LOAD_SECONDS = 300.0
_CODE = re.compile(r"[a-z][a-z0-9_]{2,63}")


class EngineClient:
    """Connections to the engine at `socket`. `name` is the base's, for messages."""

    def __init__(self, name: str, socket: Path, key: str) -> None:
        self.name = name
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(socket), limits=limits),
            base_url="http://engine",
            headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
            timeout=httpx.Timeout(None, connect=5.0),
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def healthy(self) -> bool:
        try:
            return (await self._http.get("/health", timeout=5.0)).status_code == 200
        except httpx.HTTPError:
            return False

    async def call(self, path: str, body: Mapping[str, Any], *, timeout: float | None = None) -> Any:
        """The parsed answer. Raises EngineRejected, EngineBusy, EngineFailed or NotReady."""
        async with self._answer(path, body, timeout) as response:
            return from_json(response.content)

    async def load(self, adapter: str, folder: Path) -> None:
        """Load an adapter folder as `adapter`. AdapterInvalid with the engine's reason where it will not take it."""
        try:
            await self._done("/v1/load_lora_adapter", {"lora_name": adapter, "lora_path": str(folder)})
        except NotReady:
            raise
        except (EngineRejected, EngineFailed, EngineBusy) as error:
            raise AdapterInvalid(adapter.partition("@")[0], f"the engine refused it: {error}") from None

    async def unload(self, adapter: str) -> None:
        """Unload; an adapter that is not loaded is no error."""
        try:
            await self._done("/v1/unload_lora_adapter", {"lora_name": adapter})
        except (EngineRejected, EngineBusy):
            return

    async def _done(self, path: str, body: Mapping[str, Any]) -> None:
        async with self._answer(path, body, LOAD_SECONDS):
            return

    @asynccontextmanager
    async def _answer(self, path: str, body: Mapping[str, Any], timeout: float | None) -> AsyncGenerator[httpx.Response]:
        limit = httpx.Timeout(timeout, connect=5.0)
        try:
            response = await self._http.post(path, content=to_json(body), timeout=limit)
        except httpx.TimeoutException:
            raise EngineFailed(f"the engine of base {self.name!r} did not answer in time") from None
        except httpx.TransportError:
            raise NotReady(f"the engine of base {self.name!r} went away: try again shortly") from None
        self._check(response)
        yield response

    @asynccontextmanager
    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[AsyncIterator[bytes]]:
        """The answer's server-sent events (`data: ` cut off). Leaving the block cancels what runs upstream."""
        request = self._http.build_request("POST", path, content=to_json(body))
        try:
            response = await self._http.send(request, stream=True)
        except httpx.TransportError:
            raise NotReady(f"the engine of base {self.name!r} went away: try again shortly") from None
        try:
            if response.status_code != 200:
                await response.aread()
                self._check(response)
            yield self._events(response)
        finally:
            await response.aclose()

    async def _events(self, response: httpx.Response) -> AsyncIterator[bytes]:
        rest = b""
        try:
            async for chunk in response.aiter_raw():
                *lines, rest = (rest + chunk).split(b"\n")  # bytes: a str would also split at U+2028 inside JSON
                for line in lines:
                    if line.startswith(b"data:"):
                        yield line[5:].strip()
        except httpx.TransportError:
            raise NotReady(f"the engine of base {self.name!r} went away in mid-answer") from None

    def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        message, code, param = _reason(response.content)
        if status == 404:
            raise EngineBusy(f"the engine of base {self.name!r} lacks what was asked of it: {message}")
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
