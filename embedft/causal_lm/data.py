"""Records → conversations that end in an answer. Every fault of a file is found at once, before any model loads.

Formats, told apart by their columns (or named in the recipe):
  prompt_completion  {"prompt": str, "completion": str}
  messages           {"messages": [{"role": "system" | "user" | "assistant", "content": str}, …]}, the last by the assistant;
                     an answer with "weight": 0 (or "train": false) is read and not learnt, but for the last
  alpaca             {"instruction": str, "input": str (optional), "output": str}
All three become messages: a prompt is the user's, a completion the assistant's. `references`, a list of texts, are further answers
that evaluation takes for right. Other columns are ignored, but for those that other trainers render: a row that sets one is refused,
for here it would teach something else than its file says.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from embedft.errors import DataError
from embedft.records import read_records

Format = Literal["prompt_completion", "messages", "alpaca"]
ROLES = ("system", "user", "assistant")
IN_PROMPT = ("tools", "functions", "system", "history", "chat_template_kwargs")  # columns that others put before the answer
IN_ANSWER = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # what a message says beside its content
SHARES = ("weight", "train", "training")  # whether a message is learnt


@dataclass(frozen=True)
class Message:
    """`learnt`: where it is an answer."""

    role: str
    content: str
    learnt: bool = True


@dataclass(frozen=True)
class Row:
    """`messages` ends with the assistant's; `id` is unique in its file; `references` are other answers as right as that."""

    id: str
    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    def answered(self, text: str) -> "Row":
        """The same conversation with another last answer."""
        return replace(self, messages=(*self.messages[:-1], replace(self.messages[-1], content=text)))

    @property
    def expected(self) -> tuple[str, ...]:
        """The answer and its equals, each once."""
        return tuple(dict.fromkeys((self.answer, *self.references)))


def read_rows(source: str, *, format: Format | None = None, limit: int | None = None) -> list[Row]:
    """All rows of a file or hub data set, in order. Raises DataError listing every bad row: place, fault, what was expected."""
    problems: list[str] = []
    rows: list[Row] = []
    for found in read_records(source, problems):
        place, record = found.where, found.values
        format = format or detect(record, place)
        messages = _reference_fault(record) or _unread(record) or PARSERS[format](record)
        if isinstance(messages, str):
            problems.append(f"{place}: {messages}")
        else:
            rows.append(Row(str(record.get("id", len(rows))), messages, _references(record)))
        if limit is not None and len(rows) >= limit:
            break
    if problems:
        raise DataError(problems)
    if not rows:
        raise DataError([f"{source}: no rows"])
    return rows if len({row.id for row in rows}) == len(rows) else _renumbered(rows)


def detect(record: Mapping[str, Any], place: str) -> Format:
    """The format whose columns `record` has; DataError where none fits."""
    columns = record.keys()
    if "messages" in columns:
        return "messages"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    raise DataError([f"{place}: columns {', '.join(columns)}; expected prompt and completion, messages, or instruction and output"])


def data_hash(*parts: Sequence[Row]) -> str:
    """sha256 (64 hex) over the conversations of all parts, in order."""
    digest = hashlib.sha256()
    for rows in parts:
        for row in rows:
            turns = [[message.role, message.content] + ([] if message.learnt else [False]) for message in row.messages]
            digest.update(json.dumps([*turns, list(row.references)] if row.references else turns).encode())
        digest.update(b"\n--\n")
    return digest.hexdigest()


def _renumbered(rows: Iterable[Row]) -> list[Row]:
    return [replace(row, id=str(number)) for number, row in enumerate(rows)]


def _references(record: Mapping[str, Any]) -> tuple[str, ...]:
    given: Any = record.get("references") or ()
    return (given,) if isinstance(given, str) else tuple(given)


def _reference_fault(record: Mapping[str, Any]) -> str | None:
    given: Any = record.get("references") or []
    texts: Any = [given] if isinstance(given, str) else given
    if isinstance(texts, list | tuple) and all(isinstance(text, str) and text.strip() for text in cast("list[Any]", texts)):
        return None
    return "'references' is not a text or a list of texts"


def _unread(record: Mapping[str, Any]) -> str | None:
    """What would be left out of the prompt, or None."""
    if named := next((key for key in IN_PROMPT if record.get(key)), None):
        return f"{named!r} is not read, and what it says would not be in the prompt: write it into `messages`, or drop the column"
    return None


def _unlearnt(message: Mapping[str, Any]) -> str | None:
    """What would be left out of a message, or weighed otherwise than it says; None: nothing."""
    if named := next((key for key in IN_ANSWER if message.get(key)), None):
        return f"{named!r} is not read, and would not be learnt: write it into the content as the model is to answer, or drop it"
    if named := next((key for key in SHARES if message.get(key) not in (None, 0, 1)), None):
        return f"{named!r} is {message[named]!r}, expected 0 or 1: an answer is learnt or not"
    return None


def _is_learnt(message: Mapping[str, Any]) -> bool:
    return all(message.get(key) in (None, 1) for key in SHARES)


def _text(record: Mapping[str, Any], key: str) -> str | None:
    """What is wrong with a text column, or None."""
    value = record.get(key)
    if key not in record:
        return f"no {key!r}, expected a text under it"
    if not isinstance(value, str):
        return f"{key!r} is a {type(value).__name__}, expected a text"
    return None if value.strip() else f"{key!r} is empty, expected a text"


def _prompt_completion(record: Mapping[str, Any]) -> tuple[Message, ...] | str:
    fault = _text(record, "prompt") or _text(record, "completion")
    return fault or (Message("user", record["prompt"]), Message("assistant", record["completion"]))


def _alpaca(record: Mapping[str, Any]) -> tuple[Message, ...] | str:
    fault = _text(record, "instruction") or _text(record, "output")
    given = record.get("input")
    if fault or not isinstance(given, str | None):
        return fault or f"'input' is a {type(given).__name__}, expected a text"
    prompt = record["instruction"] + (f"\n\n{given}" if given else "")
    return (Message("user", prompt), Message("assistant", record["output"]))


def _messages(record: Mapping[str, Any]) -> tuple[Message, ...] | str:
    given = record.get("messages")
    if not isinstance(given, list) or not given:
        return "'messages' is not a list with messages in it, expected [{role, content}, …]"
    messages: list[Message] = []
    for number, item in enumerate(cast("list[Any]", given), 1):
        if not isinstance(item, dict):
            return f"message {number} is a {type(item).__name__}, expected {{role, content}}"
        message = cast("dict[str, Any]", item)
        if message.get("role") not in ROLES:
            return f"message {number} has role {message.get('role')!r}, expected one of {', '.join(ROLES)}"
        if fault := _unlearnt(message) or _text(message, "content"):
            return f"message {number}: {fault}"
        messages.append(Message(message["role"], message["content"], _is_learnt(message)))
    if messages[-1].role != "assistant":
        return f"the last message is by the {messages[-1].role}, expected the assistant"
    if not messages[-1].learnt:
        return "the last answer is not to be learnt, expected a row to end with one that is"
    return tuple(messages) if len(messages) > 1 else "the only message is the answer, expected one of the user before it"


PARSERS: dict[str, Callable[[Mapping[str, Any]], tuple[Message, ...] | str]] = {
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "alpaca": _alpaca,
}
