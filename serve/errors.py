"""Errors on the wire: one table from exception to status, and OpenAI's envelope. Knows no route."""

import math
from typing import Any

from embedft.errors import (
    AdapterError,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    BaseError,
    BaseMismatch,
    EmbedftError,
    EngineBusy,
    EngineFailed,
    GenerationConflict,
    IndexInvalid,
    IndexNotFound,
    InputInvalid,
    LineageMismatch,
    MethodUnsupported,
    NotAuthorized,
    ProbesFailed,
    ServingError,
    TemplateMismatch,
    UsageError,
)


class ModelNotFound(ServingError):
    code = "model_not_found"

    def __init__(self, model: str, known: list[str], *, unserved: str | None = None) -> None:
        said = (
            f"adapter {model[:80]!r} is not served: {unserved}"
            if unserved
            else f"no model named {model[:80]!r}: there are {', '.join(known)}"
        )
        super().__init__(said)


class BodyTooLarge(ServingError):
    code = "body_too_large"


class BodySlow(ServingError):
    code = "body_timeout"


class MediaTypeUnsupported(ServingError):
    code = "media_type_unsupported"


class OriginRefused(ServingError):
    code = "origin_refused"


class NotReady(EngineBusy):
    """The engine is starting, restarting or ended; `Retry-After` goes with it."""

    code = "engine_not_ready"


class AdminRequired(ServingError):
    """The key is good, but not for this."""

    code = "admin_required"


class RateLimited(ServingError):
    """A tenant's own limit: `what` is requests, tokens, concurrency or queue. `retry_after` in seconds."""

    def __init__(self, what: str, message: str, retry_after: float) -> None:
        self.code, self.retry_after = f"{what}_limit_exceeded", retry_after
        super().__init__(message)


class QueueFull(EngineBusy):
    code = "queue_full"


class AdapterUnavailable(EngineBusy):
    """It is served, but cannot be loaded now: its files are gone or damaged."""

    code = "adapter_unavailable"


class EngineRejected(ServingError):
    """The engine refused the request as malformed; its own words and code are passed on."""

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        self.code, self.param = code or "engine_rejected", param
        super().__init__(message)


STATUS: dict[type[EmbedftError], int] = {
    InputInvalid: 400,
    UsageError: 400,
    EngineRejected: 400,
    NotAuthorized: 401,
    OriginRefused: 403,
    AdminRequired: 403,
    ModelNotFound: 404,
    AdapterNotFound: 404,
    BaseMismatch: 409,
    TemplateMismatch: 409,
    GenerationConflict: 409,
    IndexNotFound: 404,
    LineageMismatch: 409,
    IndexInvalid: 422,
    AdapterExists: 409,
    BodySlow: 408,
    BodyTooLarge: 413,
    MediaTypeUnsupported: 415,
    AdapterInvalid: 422,
    ProbesFailed: 422,
    MethodUnsupported: 422,
    AdapterError: 422,
    RateLimited: 429,
    BaseError: 500,
    EngineFailed: 502,
    EngineBusy: 503,
}
RETRY_AFTER = "2"  # seconds, with every 503 that does not know better


def status_of(error: EmbedftError) -> int:
    """The nearest ancestor's status; 500 for what the table does not know."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def headers_of(error: EmbedftError) -> dict[str, str]:
    """What goes with the status: when to come back, how to show a key."""
    status = status_of(error)
    if status in (429, 503):
        wait = getattr(error, "retry_after", None)
        return {"retry-after": RETRY_AFTER if wait is None else str(max(1, math.ceil(wait)))}
    return {"www-authenticate": "Bearer"} if status == 401 else {}


def envelope(message: str, *, code: str, status: int, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error body."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_envelope(error: EmbedftError) -> dict[str, Any]:
    return envelope(str(error), code=error.code, status=status_of(error), param=getattr(error, "param", None))
