"""Who may knock: the Host header must name this server (DNS rebinding), and a page of another origin is refused. Pure ASGI."""

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from embedft.errors import InputInvalid
from serve.config import LOOPBACK
from serve.errors import OriginRefused, as_envelope, status_of


class Door:
    """Lets requests in whose Host is a loopback name or one of `hosts`, and whose Origin, if any, is that same host."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._hosts = {host.lower() for host in (*LOOPBACK, *hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, send)
            return
        response = JSONResponse(as_envelope(refusal), status_code=status_of(refusal))
        await response(scope, receive, send)

    def _refusal(self, headers: Headers) -> InputInvalid | OriginRefused | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _name(hosts[0]) not in self._hosts:
            return InputInvalid("host_refused", "the Host header names another server: use localhost or one of allowed_hosts")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != hosts[0].lower():
            return OriginRefused("a web page of another origin may not use this server")
        return None


def _name(host: str) -> str:
    """'[::1]:8000' → '::1', 'localhost:8000' → 'localhost'."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
