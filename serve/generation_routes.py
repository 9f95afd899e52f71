"""/v1/chat/completions and /v1/completions: what the engine speaks passes through; `model` becomes the public name."""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic_core import from_json, to_json
from starlette.types import Receive, Scope, Send

from embedft.errors import EmbedftError, InputInvalid
from serve.body import read_body, unless_gone
from serve.config import Limits
from serve.engine import BASE
from serve.errors import as_envelope
from serve.gateway import Gateway
from serve.lifecycle import Resident
from serve.metrics import Outcome
from serve.openapi import described
from serve.routing import Choice, asked, choose
from serve.schemas import OURS, ChatRequest, CompletionRequest

DONE = b"[DONE]"


def generation_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["generation"])

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
    name, is_set = asked(request, given=body.adapter, is_set="adapter" in body.model_fields_set)
    choice = choose(gateway.lifecycle, task="causal_lm", model=body.model, adapter=name, is_set=is_set)
    async with AsyncExitStack() as stack:
        resident = await stack.enter_async_context(gateway.lifecycle.lease(choice.adapter)) if choice.adapter else None
        choice.engine.supervisor.require_ready()
        fields = body.model_dump(exclude_unset=True, exclude_none=True, exclude=OURS)
        sent = {**fields, "model": resident.id if resident else BASE}
        call = Call(gateway, choice, resident)
        outcome = stack.enter_context(gateway.meters.measured(choice.engine.name, call.adapter, route))
        if body.stream:
            sent["stream_options"] = {**(body.stream_options or {}), "include_usage": True}
            events = await stack.enter_async_context(choice.engine.client.stream(path, sent))
            wanted = bool((body.stream_options or {}).get("include_usage"))
            lines = call.relabelled(events, outcome, usage_wanted=wanted)
            return OwnedStream(lines, stack.pop_all(), headers=call.headers)
        answer = await unless_gone(request, choice.engine.client.call(path, sent))
        gateway.meters.count_tokens(choice.engine.name, call.adapter, answer.get("usage"))
        return Response(to_json({**answer, "model": call.public}), media_type="application/json", headers=call.headers)


class Call:
    """One request's names: what the client is told, and what is counted."""

    def __init__(self, gateway: Gateway, choice: Choice, resident: Resident | None) -> None:
        self.meters, self.base = gateway.meters, choice.engine.name
        self.adapter = resident.name if resident else None
        self.public = self.adapter or self.base
        self.headers = {"x-embedft-adapter": resident.id if resident else BASE, "x-embedft-base": self.base}

    async def relabelled(self, events: AsyncIterator[bytes], outcome: Outcome, *, usage_wanted: bool) -> AsyncIterator[bytes]:
        """The engine's events under the public name. One that dies ends the stream with an error event, no [DONE]."""
        began, first = time.perf_counter(), True
        try:
            async for payload in events:
                if first:
                    self.meters.first.labels(self.base, self.adapter or "").observe(time.perf_counter() - began)
                    first = False
                if payload == DONE:
                    yield b"data: [DONE]\n\n"
                    return
                event: dict[str, Any] = from_json(payload)
                if event.get("usage") and not event.get("choices"):
                    self.meters.count_tokens(self.base, self.adapter, event["usage"])
                    if not usage_wanted:
                        continue
                if "model" in event:
                    event["model"] = self.public
                yield b"data: " + to_json(event) + b"\n\n"
            outcome.status = "error"
        except EmbedftError as error:
            outcome.status = "error"
            yield b"data: " + to_json(as_envelope(error)) + b"\n\n"


class OwnedStream(StreamingResponse):
    """Server-sent events that hold what they need (lease, upstream connection) until sent or until the client is gone."""

    def __init__(self, lines: AsyncIterator[bytes], owned: AsyncExitStack, *, headers: dict[str, str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"})
        self._owned = owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._owned:
            await super().__call__(scope, receive, send)


def check_caps(body: ChatRequest | CompletionRequest, limits: Limits) -> None:
    """InputInvalid where a request asks for more than one may."""
    prompts = 1
    if isinstance(body, CompletionRequest) and isinstance(body.prompt, list) and not isinstance(body.prompt[0], int):
        prompts = len(body.prompt)
    if (body.n or 1) * prompts > max(limits.n, prompts if (body.n or 1) == 1 and prompts <= limits.inputs else 0):
        raise InputInvalid("n_too_large", f"n × prompts is {(body.n or 1) * prompts}: at most {limits.n} answers in one request", "n")
    asked_for = [body.max_tokens, getattr(body, "max_completion_tokens", None), body.min_tokens]
    if any(value is not None and value > limits.max_tokens for value in asked_for):
        raise InputInvalid("max_tokens_too_large", f"at most {limits.max_tokens} tokens in one answer", "max_tokens")
