"""Request bodies of the peft engine: closed, so that what it cannot do is refused and never ignored."""

import secrets
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from embedft.errors import InputInvalid
from serve.engines.peft.sampling import Sampling
from serve.engines.peft.tools import Schema, forced
from serve.fields import Many

Tokens = Annotated[Many[StrictInt], Field(min_length=1)]
Prompt = StrictStr | Tokens | Annotated[Many[StrictStr], Field(min_length=1)] | Annotated[Many[Tokens], Field(min_length=1)]


AnyBody = TypeVar("AnyBody", bound=BaseModel)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class NamedSchema(Body):
    name: StrictStr | None = None
    description: StrictStr | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class Generation(Body):
    """What completions and chat share. A field that only has one value is known, and refused when it asks for more."""

    model: str = "base"
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    n: int | None = Field(default=None, ge=1, le=128)
    seed: int | None = None
    stop: StrictStr | Many[StrictStr] | None = None
    stop_token_ids: Many[int] | None = None
    ignore_eos: bool = False
    min_tokens: int | None = Field(default=None, ge=0)
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=100)
    return_token_ids: bool | None = None
    user: str | None = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    min_p: float | None = Field(default=None, ge=0, le=1)
    logit_bias: dict[int, float] | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None

    @property
    def tool_names(self) -> frozenset[str]:
        """The tools that an answer may call."""
        return frozenset()

    def structure(self) -> Schema | None:
        """The schema that an answer must have, if any. Raises InputInvalid."""
        wanted = self.response_format
        if isinstance(wanted, SchemaFormat):
            return wanted.json_schema.content
        return {"type": "object"} if wanted and wanted.type == "json_object" else None

    def sampling(self, *, max_tokens: int, logprobs: int | None) -> list[Sampling]:
        """One for each of the `n` answers."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        count = self.n or 1
        seed = self.seed if self.seed is not None else secrets.randbits(62)
        return [
            Sampling(
                max_tokens=max_tokens,
                min_tokens=self.min_tokens or 0,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=self.top_p or 1.0,
                top_k=max(self.top_k or 0, 0),
                min_p=self.min_p or 0.0,
                seed=(seed + index) % 2**63,
                stop=tuple(text for text in stop if text),
                stop_token_ids=frozenset(self.stop_token_ids or ()),
                ignore_eos=self.ignore_eos,
                logprobs=logprobs,
                prompt_logprobs=self.prompt_logprobs,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                repetition_penalty=self.repetition_penalty or 1.0,
                logit_bias=tuple((token, min(100.0, max(-100.0, bias))) for token, bias in (self.logit_bias or {}).items()),
            )
            for index in range(count)
        ]


class Completion(Generation):
    prompt: Prompt
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
    add_special_tokens: bool = True


class TextPart(Body):
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)  # what else a message holds is the chat template's affair

    role: StrictStr
    content: StrictStr | Many[TextPart] | None = None


def text_of(content: str | list[TextPart] | None) -> str | None:
    """Text parts are lines, as in vLLM."""
    return "\n".join(part.text for part in content) if isinstance(content, list) else content


class Function(Body):
    name: Annotated[StrictStr, Field(min_length=1)]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: StrictStr


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class Chat(Generation):
    messages: Annotated[Many[Message], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Many[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools as a chat template is told of them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools or []] if self.tool_choice != "none" else []

    @property
    def tool_names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.offered)

    def structure(self) -> Schema | None:
        schema, choice = super().structure(), self.tool_choice
        if choice in (None, "none", "auto"):
            return schema
        if schema is not None:
            raise InputInvalid("unsupported_parameter", "response_format: not together with a tool that must be called", "response_format")
        named = choice.function.name if isinstance(choice, NamedTool) else None
        functions = [tool.function for tool in self.tools or [] if named in (None, tool.function.name)]
        if not functions:
            raise InputInvalid("invalid_request", "tool_choice: there is no such tool in `tools`", "tool_choice")
        return forced([(function.name, function.parameters) for function in functions])


class Embedding(Body):
    model: str = "base"
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    user: str | None = None


class LoadAdapter(Body):
    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]


class UnloadAdapter(Body):
    lora_name: Annotated[str, Field(min_length=1)]
    lora_int_id: int | None = None


def parse(kind: type[AnyBody], body: bytes) -> AnyBody:
    """The request's bytes as `kind`. Raises InputInvalid."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None


def prompts(given: Any, tokenize: Callable[[str], list[int]]) -> list[list[int]]:
    """A text, token ids, or a list of either → token ids of each."""
    if isinstance(given, str):
        return [tokenize(given)]
    if isinstance(given[0], int):
        return [list(given)]
    return [tokenize(item) if isinstance(item, str) else list(item) for item in given]


UNSUPPORTED = frozenset({"extra_forbidden", "literal_error", "none_required", "union_tag_invalid"})


def refusal(error: ValidationError) -> InputInvalid:
    """The first fault as a 400: an unknown field, or one asking for what this engine lacks, has its own code."""
    found = error.errors(include_url=False)
    fault = next((one for one in found if one["type"] in UNSUPPORTED and one["loc"][:1] == found[0]["loc"][:1]), found[0])
    param = ".".join(str(part) for part in fault["loc"]) or None
    unsupported = fault["type"] in UNSUPPORTED
    code = "unsupported_parameter" if unsupported else "invalid_request"
    what = "the peft engine does not support this" if unsupported else fault["msg"]
    return InputInvalid(code, f"{param or 'body'}: {what}", param)
