"""A request's body: read once, capped, parsed once, no key twice, then a closed schema. Knows no route."""

import asyncio
import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from embedft.errors import InputInvalid
from serve.errors import BodySlow, BodyTooLarge, MediaTypeUnsupported
from serve.fields import place, told
from serve.leaving import ClientGone

Schema = TypeVar("Schema", bound=BaseModel)
Result = TypeVar("Result")
DEEPEST, WIDEST = 100, 4096  # objects inside each other, keys of one
LOGGED = 4000  # bytes of a body in the log, where it was asked for


async def read_body(request: Request, schema: type[Schema], *, limit: int) -> Schema:
    """The body as `schema`.

    Raises BodyTooLarge, BodySlow, MediaTypeUnsupported, QueueFull, RateLimited, ClientGone, or InputInvalid (json_invalid, duplicate_key,
    unknown_parameter, invalid_parameter).
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise MediaTypeUnsupported(f"content-type is {content_type[:60] or 'absent'}: send application/json")
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise MediaTypeUnsupported(f"content-encoding is {coding[:60]}: send the body as it is")
    content, held = bytearray(), request.state.held
    try:
        async with asyncio.timeout(held.seconds):
            async for chunk in request.stream():
                held.take(len(chunk), request.state.tenant)
                content += chunk
                if len(content) > limit:
                    raise BodyTooLarge(f"the body is larger than {limit} bytes")
    except TimeoutError:
        raise BodySlow(f"the body had not come whole after {held.seconds:.0f} s") from None
    except ClientDisconnect:
        raise ClientGone from None
    if request.state.record.texts:
        request.state.record.tell(body=bytes(content[:LOGGED]).decode("utf-8", "replace"))
    return validated(schema, parse(bytes(content)))


def parse(content: bytes) -> Any:
    """JSON with no key twice in one object, no NaN, no lone surrogate."""
    try:
        text = content.decode("utf-8")
        parsed = _DECODER.decode(text)
        if text.count("{") + text.count("[") > DEEPEST:
            _check_depth(parsed)
        if "\\u" in text:
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except InputInvalid:
        raise
    except (ValueError, RecursionError) as error:
        raise InputInvalid("json_invalid", f"the body is not JSON: {str(error)[:200]}") from None
    return parsed


def _check_depth(parsed: Any) -> None:
    level = [parsed]
    for _ in range(DEEPEST):
        inner = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return
    raise InputInvalid("json_invalid", f"the body is nested more than {DEEPEST} deep")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > WIDEST:
        raise InputInvalid("json_invalid", f"an object of the body has {len(pairs)} keys: at most {WIDEST}")
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputInvalid("duplicate_key", f"the key {twice[:80]!r} is there twice: send it once", twice[:80])
    return found


def _no_constant(name: str) -> Any:
    raise InputInvalid("json_invalid", f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_no_constant)


def validated(schema: type[Schema], content: Any) -> Schema:
    """`content` as `schema`, or InputInvalid naming the first fault."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        of_one = [fault for fault in found if fault["loc"][:1] == found[0]["loc"][:1]]
        where, fault = max(
            ((place(fault, content), fault) for fault in of_one),
            key=lambda one: (len(one[0]), not one[1]["type"].endswith("_type")),  # the kind that fits furthest; not that it is no other
        )
        code = "unknown_parameter" if fault["type"] == "extra_forbidden" else "invalid_parameter"
        raise InputInvalid(code, f"{'.'.join(where)[:120] or 'body'}: {told(fault, schema)}", where[0] if where else None) from None
