"""One JSON line a request: who, what, how long, how it ended. Texts are in it only where the server was told to log them. Pure ASGI."""

import asyncio
import contextlib
import json
import re
import secrets
import sys
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.tracing import Trace

_ENCODER = json.JSONEncoder(ensure_ascii=True, default=str)
GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
QUIET = {"/health", "/ready", "/metrics"}


class Record:
    """What is known of one request so far; routes add to it. `texts`: its body is wanted too. `began`: when it came in."""

    def __init__(self, identity: str, *, texts: bool = False) -> None:
        self.identity, self.texts, self.began = identity, texts, time.perf_counter()
        self.fields: dict[str, Any] = {}

    def tell(self, **fields: Any) -> None:
        self.fields.update({name: value for name, value in fields.items() if value is not None})


class AccessLog:
    """Gives every request an id (its own `x-request-id` where that is harmless), and writes its line when the answer has been sent."""

    def __init__(
        self, app: ASGIApp, write: Callable[[str], None] | None = None, *, texts: bool = False, trace: Trace | None = None
    ) -> None:
        self._app, self._write, self._texts, self._trace = app, write or _to_stderr, texts, trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given, caller = (_header(scope, name) for name in (b"x-request-id", b"traceparent"))
        record = Record(given if GIVEN_ID.fullmatch(given) else secrets.token_hex(8), texts=self._texts)
        scope.setdefault("state", {})["record"] = record
        status, sent, at = 499, 0, time.time_ns()

        async def told(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", record.identity.encode())]
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        def write(took: float) -> None:
            self._write(line(scope, record, status=status, milliseconds=took * 1000, sent=sent))
            if self._trace:
                shown = {"id": record.identity, "status": status, **record.fields}
                shown.pop("body", None)
                route = getattr(scope.get("route"), "path", "unknown")
                self._trace(f"{scope['method']} {route}", at, at + int(took * 1e9), shown, caller)

        try:
            await self._app(scope, receive, told)
        except Exception:
            status = max(status, 500)  # as it is answered outside of this
            raise
        finally:
            if scope["path"] not in QUIET or status >= 500:  # written in the next turn: the answer leaves in this one
                asyncio.get_running_loop().call_soon(write, time.perf_counter() - record.began)


def _header(scope: Scope, wanted: bytes) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), "")


def line(scope: Scope, record: Record, *, status: int, milliseconds: float, sent: int) -> str:
    content = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": record.identity,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "ms": round(milliseconds, 1),
        "bytes": sent,
        **record.fields,
    }
    return _ENCODER.encode(content)


def _to_stderr(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk or a closed pipe ends no request
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
