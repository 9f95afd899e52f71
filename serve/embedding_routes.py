"""/v1/embeddings, and TEI's /embed."""

import base64
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from embedft.errors import InputInvalid
from serve.admission import Budget, guessed
from serve.body import read_body
from serve.config import Limits
from serve.direct import DirectRoute
from serve.embedding import Preparers, Vectors, Way, embed, way_of
from serve.gateway import Gateway
from serve.leaving import together, unless_gone
from serve.openapi import described
from serve.routing import asked, choose, choose_each
from serve.schemas import EmbeddingRequest, EmbedRequest
from serve.visible import Visible, visible

Inputs = list[str] | list[list[int]]


def embedding_routes(gateway: Gateway) -> APIRouter:
    router, preparers = APIRouter(tags=["embeddings"], route_class=DirectRoute), Preparers()

    @router.post("/v1/embeddings", **described(EmbeddingRequest, "Vectors of texts, by the base or an adapter, or one adapter an input"))
    async def embeddings(request: Request) -> Response:
        body = await read_body(request, EmbeddingRequest, limit=gateway.config.limits.body_bytes)
        return await unless_gone(request, _embeddings(gateway, request, body, preparers))

    @router.post("/embed", **described(EmbedRequest, "TEI's name and shape of /v1/embeddings: a list of vectors"))
    async def embed_texts(request: Request) -> Response:
        body = await read_body(request, EmbedRequest, limit=gateway.config.limits.body_bytes)
        return await unless_gone(request, _embed_texts(gateway, request, body, preparers))

    return router


async def _embeddings(gateway: Gateway, request: Request, body: EmbeddingRequest, preparers: Preparers) -> Response:
    inputs = _inputs(body.input)
    check_size(inputs, gateway.config.limits)
    seen, cost = visible(gateway, request), guessed(sum(map(len, inputs)))
    listed = isinstance(body.adapter, list)
    async with seen.limited(cost) as budget, AsyncExitStack() as stack:
        names, is_set = await _names(seen, request, body, len(inputs))
        choices = choose_each(seen, names, task="embedding", model=body.model, is_set=is_set)
        adapters = [choice.adapter for choice in choices.values() if choice.adapter]
        taken = await stack.enter_async_context(seen.leases(adapters)) if adapters else {}
        ways = {
            name: way_of(choice.engine, taken.get(choice.adapter or ""), input_type=body.input_type, dimensions=body.dimensions)
            for name, choice in choices.items()
        }
        groups = {name: [index for index, other in enumerate(names) if other == name] for name in ways}
        made = await _all(seen, budget, ways, groups, inputs, preparers, body)
    return _answer(body, names, ways, groups, made, listed=listed)


async def _names(seen: Visible, request: Request, body: EmbeddingRequest, count: int) -> tuple[list[str | None], bool]:
    """The adapter of each input, and whether any was named."""
    if isinstance(body.adapter, list):
        if "adapter" in request.query_params:
            raise InputInvalid("adapter_conflict", "a list of adapters in the body and ?adapter= exclude each other", "adapter")
        if len(body.adapter) != count:
            raise InputInvalid("adapter_count", f"{len(body.adapter)} adapters for {count} inputs: send one for each", "adapter")
        return body.adapter, True
    name, is_set = asked(request, given=await seen.named(body.adapter), is_set="adapter" in body.model_fields_set)
    return [name] * count, is_set


async def _embed_texts(gateway: Gateway, request: Request, body: EmbedRequest, preparers: Preparers) -> Response:
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    check_size(texts, gateway.config.limits)
    name, is_set = asked(request, given=body.adapter, is_set="adapter" in body.model_fields_set)
    seen = visible(gateway, request)
    choice = choose(seen, task="embedding", model=body.model, adapter=name, is_set=is_set)
    async with AsyncExitStack() as stack:
        resident = await stack.enter_async_context(seen.lease(choice.adapter)) if choice.adapter else None
        way = way_of(choice.engine, resident, input_type=body.prompt_name, dimensions=body.dimensions)
        if body.normalize is not None and body.normalize != way.settings.normalize:
            made = "of length 1" if way.settings.normalize else "as they come out of the model"
            raise InputInvalid("normalize_unsupported", f"these vectors are made {made}: leave `normalize` out", "normalize")
        cost = guessed(sum(map(len, texts)))
        async with seen.admitted(way.engine, seen.counted(resident), route="embeddings", cost=cost) as ticket:
            vectors = await embed(way, texts, preparers, input_type=body.prompt_name, truncate=body.truncate is not False)
            ticket.count({"prompt_tokens": vectors.tokens})
    return Response(to_json(vectors.rows.tolist()), media_type="application/json", headers=_headers({name: way}))


async def _all(
    seen: Visible,
    budget: Budget,
    ways: dict[str | None, Way],
    groups: dict[str | None, list[int]],
    inputs: Inputs,
    preparers: Preparers,
    body: EmbeddingRequest,
) -> dict[str | None, Vectors]:
    async def one(name: str | None) -> Vectors:
        way = ways[name]
        adapter = seen.counted(way.resident)
        chosen = [inputs[index] for index in groups[name]]
        cost = guessed(sum(map(len, chosen)))
        async with seen.placed(budget, way.engine, adapter, route="embeddings", cost=cost) as ticket:
            vectors = await embed(way, chosen, preparers, input_type=body.input_type, truncate=body.truncate)  # pyright: ignore[reportArgumentType]
            ticket.count({"prompt_tokens": vectors.tokens})
            return vectors

    return dict(zip(ways, await together([one(name) for name in ways]), strict=True))


def _answer(
    body: EmbeddingRequest,
    names: Sequence[str | None],
    ways: dict[str | None, Way],
    groups: dict[str | None, list[int]],
    made: dict[str | None, Vectors],
    *,
    listed: bool,
) -> Response:
    packed = body.encoding_format == "base64"
    data: list[dict[str, Any]] = [{}] * len(names)
    for name, indexes in groups.items():
        for index, row in zip(indexes, made[name].rows.astype("<f4", order="C", copy=False), strict=True):
            shown = base64.b64encode(row).decode() if packed else row.tolist()
            data[index] = {"object": "embedding", "index": index, "embedding": shown}
            if listed:
                data[index] |= {"adapter": ways[name].label, "lineage": ways[name].lineage}
    tokens = sum(vectors.tokens for vectors in made.values())
    content = {
        "object": "list",
        "data": data,
        "model": _public(ways),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "truncated": sum(vectors.truncated for vectors in made.values()),
    }
    return Response(to_json(content), media_type="application/json", headers=_headers(ways))


def _public(ways: dict[str | None, Way]) -> str:
    way = next(iter(ways.values()))
    return way.resident.name if len(ways) == 1 and way.resident else way.engine.name


def _headers(ways: dict[str | None, Way]) -> dict[str, str]:
    distinct = list(ways.values())
    return {
        "x-embedft-adapter": ", ".join(way.label for way in distinct),
        "x-embedft-base": distinct[0].engine.name,
        "x-embedft-lineage": ", ".join(way.lineage for way in distinct),
    }


def _inputs(given: str | list[int] | list[str] | list[list[int]]) -> Inputs:
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [given]  # pyright: ignore[reportReturnType]
    return given  # pyright: ignore[reportReturnType]


def check_size(inputs: Inputs, limits: Limits) -> None:
    if len(inputs) > limits.inputs:
        raise InputInvalid("too_many_inputs", f"{len(inputs)} inputs: at most {limits.inputs} in one request", "input")
    if sum(len(item) for item in inputs) > limits.text_characters:
        raise InputInvalid("input_too_large", f"more than {limits.text_characters} characters in one request", "input")
