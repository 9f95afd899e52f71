"""Who may knock: the Host header must name this server (DNS rebinding), and a page of another origin is refused. Pure ASGI."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from embedft.errors import InputInvalid
from serve.config import LOOPBACK, ServerConfig
from serve.errors import OriginRefused, QueueFull, as_envelope, headers_of, status_of


class Door:
    """Lets requests in whose Host is a loopback name or one of `allowed_hosts`, and whose Origin, if any, is that same host.

    With keys, which no browser sends by itself, any Host will do unless `allowed_hosts` names some. The bodies that are let in
    at one time have a limit; one of unknown length counts as the largest.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._limits = app, config.limits
        self._checked = not config.tenants or bool(config.allowed_hosts)
        self._keyed = bool(config.tenants)
        self._hosts = {host.lower() for host in (*LOOPBACK, *config.allowed_hosts)}
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        size = self._size(headers) if scope["method"] in ("POST", "PUT", "PATCH") else 0
        refusal = self._refusal(headers) or self._no_room(size)
        if refusal is None:
            self._held += size
            try:
                await self._app(scope, receive, send)
            finally:
                self._held -= size
            return
        response = JSONResponse(as_envelope(refusal), status_code=status_of(refusal), headers=headers_of(refusal))
        await response(scope, receive, send)

    def _size(self, headers: Headers) -> int:
        given = headers.get("content-length", "")
        return min(int(given), self._limits.body_bytes) if given.isascii() and given.isdigit() else self._limits.body_bytes

    def _no_room(self, size: int) -> QueueFull | None:
        if self._held and self._held + size > self._limits.held_bytes:
            return QueueFull("too many bytes are being worked on: come back shortly")
        return None

    def _refusal(self, headers: Headers) -> InputInvalid | OriginRefused | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or (self._checked and _name(hosts[0]) not in self._hosts):
            return InputInvalid("host_refused", "the Host header names another server: use localhost or one of allowed_hosts")
        origin = headers.get("origin")
        if origin is not None and not self._keyed and urlsplit(origin).netloc.lower() != hosts[0].lower():
            return OriginRefused("a web page of another origin may not use this server")
        return None


def _name(host: str) -> str:
    """'[::1]:8000' → '::1', 'localhost:8000' → 'localhost'."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
