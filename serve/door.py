"""Who may knock: the Host header must name this server (DNS rebinding), and a page of another origin is refused. And how many bytes of
bodies are here at once, of all and of one tenant. Pure ASGI."""

from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from embedft.errors import InputInvalid
from serve.config import LOOPBACK, ServerConfig
from serve.errors import OriginRefused, QueueFull, RateLimited, as_envelope, headers_of, status_of
from serve.tenants import Tenant


class Held:
    """One request's body, as it comes: counted until the request is answered."""

    def __init__(self, door: "Door") -> None:
        self._door, self._size = door, 0
        self._tenant: Tenant | None = None
        self.seconds = door.limits.body_seconds

    def take(self, size: int, tenant: Tenant) -> None:
        """So many bytes more. QueueFull, RateLimited; one body alone always fits."""
        limit, own = self._door.limits.held_bytes, self._door.own_bytes
        if tenant.held > self._size and tenant.held + size > own:
            raise RateLimited("bytes", f"{tenant.held} bytes of yours are being worked on: let some be answered", 2.0)
        if self._door.held > self._size and self._door.held + size > limit:
            raise QueueFull("too many bytes are being worked on: come back shortly")
        self._tenant = tenant
        self._count(size)

    def release(self) -> None:
        self._count(-self._size)

    def _count(self, size: int) -> None:
        self._size += size
        self._door.held += size
        if self._tenant is not None:
            self._tenant.held += size


class Door:
    """Lets requests in whose Host is a loopback name or one of `allowed_hosts`, and whose Origin, if any, is that same host.

    With keys, which no browser sends by itself, any Host will do unless `allowed_hosts` names some. What of bodies has come is counted in
    `held`; with keys a quarter of what there may be stays free for the others.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self.limits = app, config.limits
        self.own_bytes = config.limits.held_bytes - (config.limits.held_bytes // 4 if config.tenants else 0)
        self.held = 0
        self._checked = not config.tenants or bool(config.allowed_hosts)
        self._keyed = bool(config.tenants)
        self._hosts = {host.lower() for host in (*LOOPBACK, *config.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            held = scope.setdefault("state", {})["held"] = Held(self)
            try:
                await self._app(scope, receive, send)
            finally:
                held.release()
            return
        response = JSONResponse(as_envelope(refusal), status_code=status_of(refusal), headers=headers_of(refusal))
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> InputInvalid | OriginRefused | None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or (self._checked and _name(hosts[0]) not in self._hosts):
            return InputInvalid("host_refused", "the Host header names another server: use localhost or one of allowed_hosts")
        origin = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"), None)
        if origin is not None and not self._keyed and _place(origin) != hosts[0].lower():
            return OriginRefused("a web page of another origin may not use this server")
        return None


def _place(origin: str) -> str:
    """'http://localhost:8000' → 'localhost:8000'."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name(host: str) -> str:
    """'[::1]:8000' → '::1', 'localhost:8000' → 'localhost'."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
