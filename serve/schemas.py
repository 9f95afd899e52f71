"""Request bodies: closed, so that an engine gets what was meant. Field names are OpenAI's and vLLM's; `adapter` is ours."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from serve.fields import Many

Ids = Annotated[Many[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Number = StrictFloat | StrictInt
AdapterName = Annotated[StrictStr, Field(min_length=1, max_length=160)]
Stop = Annotated[StrictStr, Field(max_length=256)]
Count = Annotated[StrictInt, Field(ge=1)]
OURS = {"model", "adapter", "user", "store", "metadata", "service_tier"}  # never sent to an engine


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: StrictStr | None = None
    user: StrictStr | None = None


class MixMember(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter: AdapterName
    weight: Annotated[Number, Field(ge=-10, le=10)]


class Mix(BaseModel):
    """Several adapters' effects added up; weights are rounded to 0.01."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mix: Annotated[Many[MixMember], Field(min_length=1, max_length=4)]


class _Generation(_Body):
    adapter: AdapterName | Mix | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: StrictInt | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Count | None = None
    stream: StrictBool | None = None
    stream_options: dict[Literal["include_usage", "continuous_usage_stats"], StrictBool] | None = None
    stop: Stop | Annotated[Many[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[Many[StrictInt], Field(max_length=256)] | None = None
    include_stop_str_in_output: StrictBool | None = None
    ignore_eos: StrictBool | None = None
    skip_special_tokens: StrictBool | None = None
    seed: StrictInt | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[StrictStr, Number] | None = None
    response_format: dict[StrictStr, Any] | None = None
    structured_outputs: dict[StrictStr, Any] | None = None
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    store: StrictBool | None = None
    metadata: dict[StrictStr, StrictStr] | None = None
    service_tier: StrictStr | None = None


class CompletionRequest(_Generation):
    prompt: StrictStr | Ids | Annotated[Many[StrictStr], Field(min_length=1)] | Annotated[Many[Ids], Field(min_length=1)]
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    add_special_tokens: StrictBool | None = None


class Message(BaseModel):
    """One turn. What a role may carry beyond its content is the engine's business."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | Many[dict[StrictStr, Any]] | None = None


class ChatRequest(_Generation):
    messages: Annotated[Many[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: Many[dict[StrictStr, Any]] | None = None
    tool_choice: StrictStr | dict[StrictStr, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None


class EmbeddingRequest(_Body):
    input: StrictStr | Ids | Annotated[Many[StrictStr], Field(min_length=1)] | Annotated[Many[Ids], Field(min_length=1)]
    adapter: AdapterName | Mix | Many[AdapterName | None] | None = None
    input_type: Literal["query", "document"] | None = None
    truncate: StrictBool = True
    dimensions: Count | None = None
    encoding_format: Literal["float", "base64"] | None = None


class EmbedRequest(BaseModel):
    """TEI's body. `normalize` and `truncation_direction` may only say what is so; `prompt_name` is an `input_type`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: StrictStr | Annotated[Many[StrictStr], Field(min_length=1)]
    model: StrictStr | None = None
    adapter: AdapterName | None = None
    prompt_name: Literal["query", "document"] | None = None
    truncate: StrictBool | None = None
    truncation_direction: Literal["right", "Right"] | None = None
    normalize: StrictBool | None = None
    dimensions: Count | None = None


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    text: StrictStr


class RerankRequest(_Body):
    query: StrictStr
    documents: Annotated[Many[StrictStr | Document], Field(min_length=1)]
    adapter: AdapterName | Mix | None = None
    top_n: Count | None = None
    return_documents: StrictBool = False


class RagRequest(BaseModel):
    """`adapter` searches (by default the index's own), `lm_adapter` writes. `rerank_adapter` reorders what was found by its own vectors.

    `mapped`: an adapter of another lineage goes through the linear map that was fitted for this index.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: Annotated[StrictStr, Field(min_length=1)]
    adapter: AdapterName | None = None
    model: StrictStr | None = None
    lm_adapter: AdapterName | None = None
    lm_model: StrictStr | None = None
    rerank_adapter: AdapterName | None = None
    k: Annotated[StrictInt, Field(ge=1, le=100)] = 5
    fusion: Literal["none", "sparse", "rrf", "weights"] = "none"
    weight: Annotated[Number, Field(ge=0, le=1)] = 0.5
    mapped: StrictBool = False
    answer: StrictBool = True
    stream: StrictBool = False
    max_tokens: Count = 256
    temperature: Annotated[Number, Field(ge=0, le=2)] = 0.0
    user: StrictStr | None = None


class _Admin(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PutAdapter(_Admin):
    """`source`: 'store' or none for the store's current one, a generation, another name, a folder under the store's root, or an
    allowed hf://, s3://, gs:// or https:// place. Its content must be `generation` where that is given. `base`: of an adapter without
    passport; plain PEFT makes its probes, and it is marked unproven. `pin`: as it was, unless given.
    """

    source: Annotated[StrictStr, Field(min_length=1, max_length=1024)] | None = None
    pin: StrictBool | None = None
    expected_generation: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{12,64}$")] | None = None

    base: StrictStr | None = None
    generation: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{12,64}$")] | None = None


class PutAlias(_Admin):
    """Adapter's name or `name@generation` → its share of the traffic, in whole numbers."""

    variants: Annotated[dict[StrictStr, Annotated[StrictInt, Field(ge=0, le=1_000_000)]], Field(min_length=1, max_length=16)]


class PutIndex(_Admin):
    """Load or replace an index by its current version on disk."""

    expected_version: StrictStr | None = None


class LoadLora(_Admin):
    """vLLM's body for /v1/load_lora_adapter."""

    lora_name: StrictStr
    lora_path: StrictStr | None = None
    load_inplace: StrictBool = False


class UnloadLora(_Admin):
    lora_name: StrictStr
    lora_int_id: StrictInt | None = None
