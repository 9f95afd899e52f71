"""What the routes answer with, told to OpenAPI. Nothing is validated against these at run time: tests hold the answers to them."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """OpenAI's envelope; `code` is stable."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorBody


class EmbeddingUsage(_Answer):
    prompt_tokens: int
    total_tokens: int


class Usage(EmbeddingUsage):
    completion_tokens: int | None = None


class Embedding(_Answer):
    object: str
    index: int
    embedding: list[float] | str


class EmbeddingList(_Answer):
    object: str
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    truncated: int


class Choice(_Answer):
    index: int
    finish_reason: str | None


class Generated(_Answer):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Ranked(_Answer):
    index: int
    relevance_score: float


class RankedList(_Answer):
    id: str
    object: str
    model: str
    results: list[Ranked]
    usage: EmbeddingUsage


class Model(_Answer):
    id: str
    object: str
    created: int
    owned_by: str


class ModelList(_Answer):
    object: str
    data: list[Model]


class AdapterShown(_Answer):
    name: str
    state: str


class AdapterList(_Answer):
    object: str
    data: list[AdapterShown]


class Verified(_Answer):
    name: str
    generation: str
    probe: dict[str, Any]


class AliasList(_Answer):
    object: str
    data: dict[str, dict[str, int]]


class AliasShown(_Answer):
    name: str
    variants: dict[str, int] | None


class Readiness(_Answer):
    ready: bool
    bases: dict[str, str]


class Health(_Answer):
    status: str


class Shown(_Answer):
    """An object."""


class Rows(_Answer):
    object: str
    data: list[dict[str, Any]]
