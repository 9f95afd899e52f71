"""An engine's end: calls become requests to its ASGI app, as uvicorn makes them of HTTP, which goes on beside it on the same socket."""

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from pathlib import Path
from types import MappingProxyType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.link.frames import BROKEN, CALL, CANCEL, FIRST, HELLO, LAST, PACE, PAUSE, RESUME, STATUS, Framed

log = logging.getLogger("uvicorn.error")
PATIENCE = 4096  # bytes within which a hello must have ended
FIRST_PIECES = 2  # of a stream, that wait for nothing: a chat's first names the role alone, and with the second begins the answer


Content = bytes | AsyncGenerator[bytes]
Answer = Callable[[bytes], Coroutine[Any, Any, tuple[int, Content]]]
Straight = Mapping[str, Answer]


def serve(app: Any, socket: Path, *, grace: int, straight: Straight | None = None, key: str = "") -> None:
    """Serve an ASGI app until SIGTERM, then for at most `grace` seconds what still runs.

    `straight`: by path, what answers a call of the link that came with `key` without the app: a body to a status and a body, whole or
    in parts. It is cancelled where nobody waits for it any more.
    """
    http = protocol(straight, key)
    uvicorn.run(app, uds=str(socket), log_level="warning", access_log=False, timeout_graceful_shutdown=grace, http=http)


def protocol(straight: Straight | None = None, key: str = "") -> Any:
    """LinkOrHttp with what it answers straight."""
    return type("StraightOrHttp", (LinkOrHttp,), {"straight": straight or {}, "key": key.encode()})


class LinkOrHttp(HttpToolsProtocol):
    """uvicorn's protocol, but for a connection that begins with HELLO: that one is a Calls."""

    straight: Straight = MappingProxyType({})
    key = b""
    _begun = b""
    _is_http = False

    def data_received(self, data: bytes) -> None:
        if not self._is_http:
            self._begun += data
            if self._begun[: len(HELLO)] == HELLO[: len(self._begun)]:
                hello, ended, rest = self._begun.partition(b"\n")
                if ended:
                    self._become_a_link(hello[len(HELLO) :], rest)
                elif len(hello) > PATIENCE:
                    self.transport.close()
                return
            self._is_http, data = True, self._begun
        super().data_received(data)

    def _become_a_link(self, key: bytes, rest: bytes) -> None:
        self.connections.discard(self)
        calls = Calls(self, key)
        self.connections.add(calls)  # pyright: ignore[reportArgumentType]
        self.transport.set_protocol(calls.end)
        calls.end.connection_made(self.transport)
        calls.end.data_received(rest)


class Calls:
    """All calls of one connection. uvicorn keeps it among its connections: it waits for them when it shuts down."""

    def __init__(self, http: LinkOrHttp, key: bytes) -> None:
        self.http = http
        self.straight = http.straight if hmac.compare_digest(key, http.key) else {}
        self.headers = [(b"host", b"engine"), (b"content-type", b"application/json"), (b"authorization", b"Bearer " + key)]
        self.end = Framed(self._received, self._lost)
        self._running: dict[int, _Call] = {}
        self._closing = False

    def shutdown(self) -> None:
        """uvicorn's word that the end has come: what runs may finish."""
        self._closing = True
        if not self._running:
            self.end.close()

    def _done(self, number: int) -> None:
        self._running.pop(number, None)
        if self._closing and not self._running:
            self.end.close()

    def _received(self, number: int, kind: int, content: bytes) -> None:
        if kind == CALL:
            call = self._running[number] = _Call(self, number, content)
            task = call.started()
            self.http.tasks.add(task)
            task.add_done_callback(self.http.tasks.discard)
            task.add_done_callback(lambda _: self._done(number))
        elif call := self._running.get(number):
            call.told(kind)

    def _lost(self) -> None:
        self.http.connections.discard(self)  # pyright: ignore[reportArgumentType]
        for call in self._running.values():
            call.told(CANCEL)


class _Call:
    """One request and its answer: an ASGI scope, `receive` and `send`."""

    def __init__(self, calls: Calls, number: int, content: bytes) -> None:
        self._calls, self._number = calls, number
        line, _, body = content.partition(b"\n")
        self._method, _, path = line.partition(b" ")
        self._path, _, self._query = path.partition(b"?")
        self._body: bytes | None = body
        self._straight: Answer | None = calls.straight.get(self._path.decode("ascii"))
        self._task: asyncio.Task[None] | None = None
        self._loop, self._wrote, self._first = asyncio.get_running_loop(), 0.0, FIRST_PIECES
        self._over, self._going = asyncio.Event(), asyncio.Event()  # answered, or nobody waits for it; not told to pause
        self._going.set()

    def started(self) -> asyncio.Task[None]:
        self._task = asyncio.ensure_future(self._run())
        return self._task

    def told(self, kind: int) -> None:
        if kind == CANCEL:
            self._over.set()
            if self._straight and self._task:
                self._task.cancel()
        if kind == PAUSE:
            self._going.clear()
        if kind in (CANCEL, RESUME):
            self._going.set()

    async def _run(self) -> None:
        try:
            if self._straight:
                await self._answer(*await self._straight(self._body or b""))
            else:
                await self._calls.http.app(self._scope(), self._receive, self._send)  # pyright: ignore[reportArgumentType]
        except Exception:
            log.exception("Exception in ASGI application")
        finally:
            if not self._over.is_set():
                self._calls.end.write(self._number, LAST | BROKEN)

    async def _answer(self, status: int, content: Content) -> None:
        self._head(status)
        if isinstance(content, bytes):
            await self._part(content, last=True)
            return
        async with aclosing(content):
            async for part in content:
                await self._part(part)
        await self._part(b"", last=True)

    def _scope(self) -> dict[str, Any]:
        path, http = self._path.decode("ascii"), self._calls.http
        return {
            "type": "http",
            "asgi": {"version": http.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": http.server,
            "client": http.client,
            "scheme": "http",
            "root_path": http.root_path,
            "headers": [*self._calls.headers, (b"content-length", str(len(self._body or b"")).encode())],
            "state": http.app_state.copy(),
            "method": self._method.decode("ascii"),
            "path": http.root_path + path,
            "raw_path": http.root_path.encode() + self._path,
            "query_string": self._query,
        }

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._over.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self._over.is_set():
            await asyncio.sleep(0)  # a turn for whoever is to end this
        elif message["type"] == "http.response.start":
            self._head(message["status"])
        else:
            await self._part(message.get("body", b""), last=not message.get("more_body", False))

    def _head(self, status: int) -> None:
        self._calls.end.write(self._number, FIRST, STATUS.pack(status))

    async def _part(self, content: bytes, *, last: bool = False) -> None:
        await self._calls.end.drained()
        await self._going.wait()
        if self._over.is_set():
            return
        now = self._loop.time()
        may_wait = not last and not self._first and now - self._wrote < PACE
        self._calls.end.write(self._number, LAST if last else 0, content, may_wait=may_wait)
        self._wrote, self._first = now, max(0, self._first - 1)
        if last:
            self._over.set()
