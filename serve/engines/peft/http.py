"""The peft engine's routes: vLLM's small HTTP over one worker. Knows no process and no socket."""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from embedft.errors import AdapterNotFound, EmbedftError, EngineBusy, EngineFailed, InputInvalid
from embedft.model_folder import stop_tokens
from serve.engines import vectors
from serve.engines.peft import answers, bodies
from serve.engines.peft.generation import Answering, Request, room_for
from serve.engines.peft.structure import Grammars
from serve.engines.peft.tools import for_template
from serve.engines.peft.worker import Worker
from serve.leaving import ClientGone, unless_gone
from serve.link.engine import Answer, Content

if TYPE_CHECKING:
    import numpy as np

STATUS: dict[type[EmbedftError], int] = {AdapterNotFound: 404, EngineBusy: 503, EngineFailed: 500}  # any other of ours: 400
Tokenized = TypeVar("Tokenized")
INLINE_BYTES = 20_000  # of a body; tokenising more takes milliseconds
COMPLETION_TOKENS = 16  # OpenAI's default
_BROKEN = answers.failure(500, "engine_failed", "the engine met an error of its own: its log has it")
log = logging.getLogger("uvicorn.error")


def create_app(worker: Worker, *, key: str, context: int, longest: int | None = None) -> Starlette:
    """`key`: the bearer key asked for everywhere but on /health; '' asks for none. `context`: the longest sequence, in tokens;
    `longest`: the longest answer.
    """
    routes = Routes(worker, context, longest)

    def guarded(handler: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        async def check(request: HttpRequest) -> Response:
            given = request.headers.get("authorization", "")
            if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
                return JSONResponse(answers.failure(401, "not_authorized", "a valid bearer key is needed"), 401)
            return await handler(request)

        return check

    table: list[tuple[str, str, Callable[[HttpRequest], Awaitable[Response]]]] = [("GET", "/v1/models", routes.models)]
    table += [("POST", "/v1/load_lora_adapter", routes.load), ("POST", "/v1/unload_lora_adapter", routes.unload)]
    if worker.encoder is not None:
        table += [("POST", "/v1/embeddings", routes.embed), ("POST", vectors.PATH, routes.vectors)]
        straight = {vectors.PATH: _straight(routes.packed_vectors)}
    else:
        table += [("POST", "/v1/completions", routes.complete), ("POST", "/v1/chat/completions", routes.chat)]
        straight = {"/v1/completions": _straight(routes.completion), "/v1/chat/completions": _straight(routes.turn)}
    listed = [Route("/health", routes.health)]
    listed += [Route(path, guarded(handler), methods=[method]) for method, path, handler in table]
    app = Starlette(routes=listed, exception_handlers={EmbedftError: _refuse, HTTPException: _no_route, Exception: _broken})
    app.state.straight = straight
    return app


class Routes:
    """One method a route."""

    def __init__(self, worker: Worker, context: int, longest: int | None = None) -> None:
        self.worker, self.context, self.longest = worker, context, longest
        base = worker.bank.base
        self.tokenizer: Any = base.tokenizer
        ended: Any = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
        known = [*stop_tokens(self.tokenizer), *(ended if isinstance(ended, list) else [ended])]
        self.eos = frozenset(int(token) for token in known if token is not None)
        self.grammars = Grammars(self.tokenizer, vocabulary=base.model.config.vocab_size, eos=self.eos)

    async def health(self, request: HttpRequest) -> Response:
        del request
        return Response()

    async def models(self, request: HttpRequest) -> Response:
        del request
        listed = [{"id": "base", "object": "model", "parent": None}]
        listed += [{"id": name, "object": "model", "parent": "base"} for name in self.worker.names]
        return JSONResponse({"object": "list", "data": listed})

    async def load(self, request: HttpRequest) -> Response:
        body = bodies.parse(bodies.LoadAdapter, await request.body())
        if body.lora_name == "base":
            raise InputInvalid("adapter_exists", "'base' names the base", "lora_name")
        await self.worker.load(body.lora_name, Path(body.lora_path))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: HttpRequest) -> Response:
        body = bodies.parse(bodies.UnloadAdapter, await request.body())
        await self.worker.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def embed(self, request: HttpRequest) -> Response:
        content = await request.body()
        body = bodies.parse(bodies.Embedding, content)
        adapter = self._adapter(body.model)
        encoder = self.worker.encoder
        assert encoder is not None
        ids = await _beside(
            content, lambda: bodies.prompts(body.input, lambda text: encoder.preparer.prepare([text], truncate=False).ids[0])
        )
        rows = await self._embedded(adapter, ids)
        made = answers.embeddings(body.model, rows, tokens=sum(map(len, ids)), encoding=body.encoding_format)
        return Response(to_json(made), media_type="application/json")

    async def vectors(self, request: HttpRequest) -> Response:
        return Response(await self.packed_vectors(await request.body()), media_type=vectors.MEDIA_TYPE)

    async def packed_vectors(self, content: bytes) -> bytes:
        body = bodies.parse(vectors.VectorsRequest, content)
        return vectors.packed(await self._embedded(self._adapter(body.model), body.input))

    async def _embedded(self, adapter: str | None, ids: list[list[int]]) -> "np.ndarray":
        room_for(ids, None, context=self.context + 1, vocabulary=self.worker.bank.base.model.config.vocab_size, param="input")
        return await self.worker.embed(adapter, ids)

    async def complete(self, request: HttpRequest) -> Response:
        return await _over_http(request, await self.completion(await request.body()))

    async def chat(self, request: HttpRequest) -> Response:
        return await _over_http(request, await self.turn(await request.body()))

    async def completion(self, content: bytes) -> Answering:
        """A prompt's, begun."""
        body = bodies.parse(bodies.Completion, content)
        special = body.add_special_tokens
        ids = await _beside(
            content, lambda: bodies.prompts(body.prompt, lambda text: self.tokenizer(text, add_special_tokens=special)["input_ids"])
        )
        return await self._begun("text_completion", body, ids, body.max_tokens or COMPLETION_TOKENS, body.logprobs)

    async def turn(self, content: bytes) -> Answering:
        """A chat's, begun."""
        body = bodies.parse(bodies.Chat, content)
        if not self.tokenizer.chat_template:
            raise InputInvalid("chat_template_missing", "this base has no chat template: use /v1/completions", "messages")
        messages = [message.model_dump() | {"content": bodies.text_of(message.content)} for message in body.messages]
        ids = await _beside(content, lambda: self._rendered(for_template(messages), body.offered))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens = body.max_completion_tokens or body.max_tokens
        return await self._begun("chat.completion", body, [ids], max_tokens, logprobs)

    def _rendered(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
        def by(**more: Any) -> list[int]:
            return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False, **more))

        try:
            ids = by(tools=tools) if tools else by()
        except Exception as error:  # whatever the template raises on roles it does not know
            raise InputInvalid("messages_invalid", f"the chat template refuses these messages: {error}", "messages") from None
        if tools and ids == by():
            raise InputInvalid("tools_unsupported", "this base's chat template does not know tools: leave them out", "tools")
        return ids

    async def _begun(
        self,
        kind: answers.Kind,
        body: bodies.Generation,
        ids: list[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
    ) -> Answering:
        adapter = self._adapter(body.model)
        if body.stream and body.prompt_logprobs is not None:
            raise InputInvalid("unsupported_parameter", "prompt_logprobs cannot be streamed", "prompt_logprobs")
        vocabulary = self.worker.bank.base.model.config.vocab_size
        room = room_for(ids, max_tokens, context=self.context, vocabulary=vocabulary, most=self.longest)
        if any(not 0 <= token < vocabulary for token in body.logit_bias or {}):
            raise InputInvalid("token_unknown", f"token ids go from 0 to {vocabulary - 1}", "logit_bias")
        if (body.min_tokens or 0) > room:
            raise InputInvalid("invalid_request", f"min_tokens {body.min_tokens} is more than the {room} that there may be", "min_tokens")
        shapes = answers.Answers(kind, body.model, self.tokenizer, ids, n=body.n or 1, ids=bool(body.return_token_ids))
        schema = body.structure()
        if schema is not None and body.min_tokens:
            raise InputInvalid("unsupported_parameter", "min_tokens: not together with an answer that must have a form", "min_tokens")
        structure = await self.grammars.structure(schema) if schema is not None else None
        generation = Request(
            self.worker, body, prompts=ids, adapter=adapter, max_tokens=room, logprobs=logprobs, eos=self.eos, structure=structure
        )
        usage = body.stream_options is not None and body.stream_options.include_usage
        return Answering(generation, shapes, body.stream, usage)

    def _adapter(self, model: str) -> str | None:
        if model == "base":
            return None
        if model not in self.worker.names:
            raise AdapterNotFound(model)
        return model


async def _beside(content: bytes, tokenize: Callable[[], Tokenized]) -> Tokenized:
    """What `tokenize` gives; of a long body on a thread, so that nobody else waits for it."""
    return tokenize() if len(content) <= INLINE_BYTES else await asyncio.to_thread(tokenize)


async def _over_http(request: HttpRequest, answering: Answering) -> Response:
    if answering.streamed:
        return StreamingResponse(answering.events(), media_type="text/event-stream")
    try:
        return Response(await unless_gone(request, answering.whole()), media_type="application/json")
    except ClientGone:
        return Response(status_code=499)


def _straight(answered: Callable[[bytes], Awaitable[bytes | Answering]]) -> Answer:
    """What the link calls with a body: the same answers and refusals without the routes' machinery, which takes longer than they do."""

    async def answer(content: bytes) -> tuple[int, Content]:
        try:
            found = await answered(content)
            if isinstance(found, bytes):
                return 200, found
            return 200, found.events() if found.streamed else await found.whole()
        except EmbedftError as error:
            return _refusal(error)
        except Exception:
            log.exception("a call failed")
            return 500, to_json(_BROKEN)

    return answer


async def _refuse(request: HttpRequest, error: Exception) -> Response:
    del request
    assert isinstance(error, EmbedftError)
    status, content = _refusal(error)
    return Response(content, status, media_type="application/json")


def _refusal(error: EmbedftError) -> tuple[int, bytes]:
    status = STATUS.get(type(error), 400)
    return status, to_json(answers.failure(status, error.code, str(error), getattr(error, "param", None)))


async def _no_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(answers.failure(error.status_code, "no_such_route", what), error.status_code)


async def _broken(request: HttpRequest, error: Exception) -> Response:
    del request, error
    return JSONResponse(_BROKEN, 500)
