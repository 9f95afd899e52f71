"""/v1/chat/completions and /v1/completions: what the engine speaks passes through; `model` becomes the public name."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic_core import from_json, to_json
from starlette.types import Receive, Scope, Send

from embedft.errors import EmbedftError, InputInvalid, TemplateMismatch
from serve.admission import CHARACTERS_A_TOKEN, Ticket, guessed
from serve.body import read_body
from serve.config import Limits
from serve.direct import DirectRoute
from serve.engine import BASE, Engine
from serve.errors import as_envelope
from serve.gateway import Gateway
from serve.leaving import ClientGone, unless_gone
from serve.openapi import described
from serve.resident import Resident
from serve.routing import Choice, asked, choose
from serve.schemas import OURS, ChatRequest, CompletionRequest
from serve.visible import visible

DONE = b"[DONE]"
# Events are not parsed but for the one with the usage. Inside a JSON string each quote has a backslash before it, so these match keys only.
_MODEL = re.compile(rb'(?<!\\)"model"\s*:\s*"(?:[^"\\]|\\.)*"')
_NO_CHOICES = re.compile(rb'(?<!\\)"choices"\s*:\s*\[\s*\]')
SALTED = ("vllm", "fake")  # engines that keep prefixes from one request to the next
DEFAULT_TOKENS = 256  # of an answer, where the request names no number


def generation_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["generation"], route_class=DirectRoute)

    @router.post("/v1/chat/completions", **described(ChatRequest, "A chat's next turn, by the base or an adapter"))
    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatRequest, limit=gateway.config.limits.body_bytes)
        return await _generate(gateway, request, body, "/v1/chat/completions", "chat")

    @router.post("/v1/completions", **described(CompletionRequest, "A prompt's continuation, by the base or an adapter"))
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionRequest, limit=gateway.config.limits.body_bytes)
        return await _generate(gateway, request, body, "/v1/completions", "completions")

    return router


async def _generate(gateway: Gateway, request: Request, body: ChatRequest | CompletionRequest, path: str, route: str) -> Response:
    check_caps(body, gateway.config.limits)
    async with AsyncExitStack() as stack:
        found = await unless_gone(request, _begun(stack, gateway, request, body, path, route))
        if isinstance(found, Response):
            return found
        call, lines = found
        return OwnedStream(lines, stack.pop_all(), headers=call.headers)


async def _begun(
    stack: AsyncExitStack, gateway: Gateway, request: Request, body: ChatRequest | CompletionRequest, path: str, route: str
) -> "Response | tuple[Call, AsyncIterator[bytes]]":
    """The answer, or of one that is streamed its lines; what they need is held by `stack`."""
    seen, cost = visible(gateway, request), cost_of(body)
    budget = await stack.enter_async_context(seen.limited(cost))
    name, is_set = asked(request, given=await seen.named(body.adapter), is_set="adapter" in body.model_fields_set)
    choice = choose(seen, task="causal_lm", model=body.model, adapter=name, is_set=is_set)
    resident = await stack.enter_async_context(seen.lease(choice.adapter)) if choice.adapter else None
    choice.engine.supervisor.require_ready()
    if resident and route == "chat":
        check_template(resident)
    if isinstance(body, ChatRequest):
        check_tools(body, choice.engine)
    fields = body.model_dump(exclude_unset=True, exclude_none=True, exclude=OURS)
    sent = {**fields, "model": resident.id if resident else BASE}
    if choice.engine.config.engine in SALTED:
        sent["cache_salt"] = gateway.tenants.salt(seen.tenant)
    adapter = seen.counted(resident)
    ticket = await stack.enter_async_context(seen.placed(budget, choice.engine, adapter, route=route, cost=cost))
    call = Call(choice, resident, ticket, began=seen.record.began)
    if body.stream:
        sent["stream_options"] = {**(body.stream_options or {}), "include_usage": True}
        events = await stack.enter_async_context(choice.engine.client.stream(path, sent))
        wanted = bool((body.stream_options or {}).get("include_usage"))
        return call, call.relabelled(events, usage_wanted=wanted)
    answer = await choice.engine.client.call(path, sent)
    ticket.count(answer.get("usage"))
    return Response(to_json({**answer, "model": call.public}), media_type="application/json", headers=call.headers)


class Call:
    """One request's names: what the client is told, and what is counted. `began`: when it came in."""

    def __init__(self, choice: Choice, resident: Resident | None, ticket: Ticket, *, began: float) -> None:
        self.ticket, self.base, self._began = ticket, choice.engine.name, began
        self.adapter = ticket.adapter
        self.public = resident.name if resident else self.base
        self.headers = {"x-embedft-adapter": resident.id if resident else BASE, "x-embedft-base": self.base}

    async def relabelled(self, events: AsyncIterator[list[bytes]], *, usage_wanted: bool) -> AsyncIterator[bytes]:
        """The engine's events under the public name, those together that came so. One that dies ends the stream with an error event,
        no [DONE]."""
        first = True
        try:
            async for together in events:
                if first:
                    self.ticket.meters.first.labels(self.base, self.adapter or "").observe(time.perf_counter() - self._began)
                    first = False
                if shown := b"".join([self._shown(payload, usage_wanted=usage_wanted) for payload in together]):
                    yield shown
                if DONE in together:
                    return
            self.ticket.outcome.status = "error"
        except EmbedftError as error:
            self.ticket.outcome.status = "error"
            yield b"data: " + to_json(as_envelope(error)) + b"\n\n"

    def _shown(self, payload: bytes, *, usage_wanted: bool) -> bytes:
        if payload == DONE:
            return b"data: [DONE]\n\n"
        if without_choices(payload) and (event := from_json(payload)).get("usage") and not event.get("choices"):
            self.ticket.count(event["usage"])
            if not usage_wanted:
                return b""
        return b"data: " + renamed(payload, self.public) + b"\n\n"


def renamed(payload: bytes, public: str) -> bytes:
    """An event's JSON under another `model`; all else as it was, byte for byte."""
    return _MODEL.sub(lambda _: b'"model":' + to_json(public), payload, count=1)


def without_choices(payload: bytes) -> bool:
    """Whether an event's JSON has an empty list of choices, as the one with the usage has."""
    return _NO_CHOICES.search(payload) is not None


class OwnedStream(StreamingResponse):
    """Server-sent events that hold what they need (lease, upstream connection) until sent or until the client is gone."""

    def __init__(self, lines: AsyncIterator[bytes], owned: AsyncExitStack, *, headers: dict[str, str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"})
        self._owned = owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            async with self._owned:
                await unless_gone(Request(scope, receive), self.stream_response(send))
                await asyncio.sleep(0)  # uvloop sends at the end of a turn: the last bytes first, then what is left to be done


def check_template(resident: Resident) -> None:
    """TemplateMismatch where the engine would render a chat otherwise than the trainer did."""
    learnt = resident.passport.template_hash
    if learnt and learnt != resident.engine.template_hash:
        raise TemplateMismatch(resident.name)


def check_tools(body: ChatRequest, engine: Engine) -> None:
    """InputInvalid where vLLM was not told how this base's text says that it calls a tool."""
    if body.tools and body.tool_choice != "none" and engine.config.engine == "vllm" and engine.config.tool_parser is None:
        why = f"base {engine.name!r} in vLLM takes tools only with a `tool_parser` in the server's CONFIG, such as hermes: leave them out"
        raise InputInvalid("tools_unsupported", why, "tools")


def cost_of(body: ChatRequest | CompletionRequest) -> int:
    """The most tokens that a request may use, guessed from its characters."""
    asked_for = body.max_tokens or getattr(body, "max_completion_tokens", None) or DEFAULT_TOKENS
    return guessed(_characters(body), asked_for * (body.n or 1) * len(_prompts(body)))


def _prompts(body: ChatRequest | CompletionRequest) -> Sequence[str | list[int]]:
    """A completion's, texts or token ids; a chat is one of all its messages and tools."""
    if isinstance(body, ChatRequest):
        return ["".join([*(str(message.content or "") for message in body.messages), *map(str, body.tools or [])])]
    return [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt  # pyright: ignore[reportReturnType]


def _characters(body: ChatRequest | CompletionRequest) -> int:
    """Of all that it is to read; a token counts as so many as one usually has."""
    return sum(len(prompt) * (1 if isinstance(prompt, str) else CHARACTERS_A_TOKEN) for prompt in _prompts(body))


def check_caps(body: ChatRequest | CompletionRequest, limits: Limits) -> None:
    """InputInvalid where a request asks for more than one may, or for what goes only with something else."""
    if body.stream_options and not body.stream:
        raise InputInvalid("invalid_parameter", "stream_options: only with stream true", "stream_options")
    if isinstance(body, ChatRequest) and body.top_logprobs and not body.logprobs:
        raise InputInvalid("invalid_parameter", "top_logprobs: only with logprobs true", "top_logprobs")
    prompts, n = len(_prompts(body)), body.n or 1
    if prompts > limits.prompts:
        raise InputInvalid("too_many_inputs", f"{prompts} prompts: at most {limits.prompts} in one request", "prompt")
    if n > 1 and n * prompts > limits.n:
        raise InputInvalid("n_too_large", f"n × prompts is {n * prompts}: at most {limits.n} answers in one request", "n")
    if _characters(body) > limits.text_characters:
        what = "prompt" if isinstance(body, CompletionRequest) else "messages"
        raise InputInvalid("input_too_large", f"more than {limits.text_characters} characters in one request", what)
    asked_for = [body.max_tokens, getattr(body, "max_completion_tokens", None), body.min_tokens]
    if any(value is not None and value > limits.max_tokens for value in asked_for):
        raise InputInvalid("max_tokens_too_large", f"at most {limits.max_tokens} tokens in one answer", "max_tokens")
