"""Kinds of fields that bodies of the gateway and of the engines share, and what is said of a field that is none."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, Field

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]  # its first fault is told: a million of them take seconds and gigabytes
LONGEST = 64  # characters of a name that is compared with others: a body may hold one of megabytes


def told(fault: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Pydantic's word on one fault of `model`; of a field that there is none of, the nearest that there is."""
    if fault["type"] != "extra_forbidden":
        return str(fault["msg"]).removeprefix("Value error, ")
    *place, name = fault["loc"]
    sections = [model]
    for part in place:  # an index, or the name that pydantic gives a branch, leads nowhere further
        sections = [inner for section in sections for inner in _inside(section, part)] or sections
    known = [field for section in sections for field in section.model_fields]
    near = difflib.get_close_matches(str(name)[:LONGEST], known, n=1)
    return "there is no such field" + (f"; did you mean {near[0]!r}?" if near else "")


def place(fault: Mapping[str, Any], content: Any) -> list[str]:
    """The keys and indexes of `content` that lead to the fault; of a union pydantic also names a branch, which stands nowhere."""
    found: list[str] = []
    for part in fault["loc"]:
        if isinstance(content, dict | list):
            there = part in content if isinstance(content, dict) else part in range(len(content))
            if there:
                content = content[part]
            if there or (fault["type"] == "missing" and part == fault["loc"][-1]):
                found.append(str(part))
    return found


def _inside(section: type[BaseModel], field: Any) -> Iterator[type[BaseModel]]:
    return _models(section.model_fields[field].annotation) if field in section.model_fields else iter(())


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from _models(part)
