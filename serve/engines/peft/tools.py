"""Tool calls: what a chat template is told of them, and how they are found in an answer. Pure: texts in, calls out.

Two forms are read: Hermes' `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, and an answer that is such an object, or a list of
them, and nothing else (Llama's `parameters` for `arguments` too). What names no tool of the request stays text.
"""

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from embedft.errors import InputInvalid

OPEN = "<tool_call>"
_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
Schema = dict[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is JSON, as OpenAI has it."""

    name: str
    arguments: str
    identity: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class ToolReader:
    """Fed an answer piece by piece, it gives back what is certainly text; the calls are known at the end."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._held = ""
        self._told = False

    def feed(self, text: str) -> str:
        self._held += text
        if not self._told and self._held.lstrip()[:1] in ("{", "[", ""):
            return ""
        at = self._held.find(OPEN)
        if at < 0:
            at = next((len(self._held) - size for size in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:size])), len(self._held))
        said, self._held = self._held[:at], self._held[at:]
        self._told = self._told or bool(said.strip())
        return said

    def end(self) -> tuple[str, list[ToolCall]]:
        """(text that turned out to be no call, calls)."""
        blocks = _BLOCK.findall(self._held)
        read = [_calls(block, self._names) for block in (blocks or [self._held] if not self._told or blocks else [])]
        calls = [call for part in read for call in part]
        return ("", calls) if calls and all(read) else (self._held, [])


def _calls(text: str, names: frozenset[str]) -> list[ToolCall]:
    """None at all where any part of `text` is something else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return []
    listed: list[Any] = content if isinstance(content, list) else [content]
    calls = [_call(one, names) for one in listed]
    return [call for call in calls if call] if all(calls) else []


def _call(one: Any, names: frozenset[str]) -> ToolCall | None:
    if not isinstance(one, dict) or one.get("name") not in names:
        return None
    arguments: Any = one.get("arguments", one.get("parameters"))
    return ToolCall(str(one["name"]), json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def for_template(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Earlier calls' arguments as objects, which is how templates write them down. InputInvalid."""
    return [{**one, "tool_calls": _all_opened(one["tool_calls"])} if one.get("tool_calls") else one for one in messages]


def _all_opened(calls: Any) -> list[Any]:
    if not isinstance(calls, list):
        raise InputInvalid("messages_invalid", "tool_calls: expected a list of calls", "messages")
    return [_opened(call) for call in calls]


def _opened(call: Any) -> Any:
    try:
        given = call["function"]["arguments"]
        arguments = json.loads(given) if isinstance(given, str) else given
    except (TypeError, KeyError, ValueError, RecursionError):
        raise InputInvalid("messages_invalid", "a tool call needs a function with a name and arguments in JSON", "messages") from None
    return {**call, "function": {**call["function"], "arguments": arguments}}


def forced(functions: Sequence[tuple[str, Schema | None]]) -> Schema:
    """The schema of one call of any of these (name, parameters). InputInvalid where two define one `$defs` entry differently."""
    shared: dict[str, Schema] = {"$defs": {}, "definitions": {}}  # a reference starts at the root, so definitions must stand there
    calls: list[Schema] = []
    for name, parameters in functions:
        schema: Schema = dict(parameters) if parameters else {"type": "object"}
        for place, known in shared.items():
            entries = schema.pop(place, {})
            if not isinstance(entries, dict):
                raise InputInvalid("schema_invalid", f"{place} of tool {name[:80]!r} is no object", "tools")
            for key, value in entries.items():
                if known.setdefault(key, value) != value:
                    raise InputInvalid("schema_invalid", f"two tools define {place}/{key} differently: rename one", "tools")
        properties = {"name": {"const": name}, "arguments": schema}
        calls.append({"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False})
    return {"anyOf": calls, **shared}
