"""/v1/rerank in the shape of Cohere, Jina and infinity: documents in order of their relevance to a query.

By an embedding base or adapter: cosines of its vectors, query and documents with the prompts of their kind. By a cross-encoder: its scores.
"""

import time
import uuid
from contextlib import AsyncExitStack

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic_core import to_json

from embedft.errors import InputInvalid
from embedft.vectors import unit
from serve.admission import guessed
from serve.body import read_body
from serve.direct import DirectRoute
from serve.embedding import Preparers, embed, way_of
from serve.embedding_routes import check_size
from serve.engine import BASE, Engine
from serve.gateway import Gateway
from serve.leaving import together, unless_gone
from serve.openapi import described
from serve.routing import asked, choose
from serve.schemas import RerankRequest
from serve.visible import Visible, visible


def rerank_routes(gateway: Gateway) -> APIRouter:
    router, preparers = APIRouter(tags=["embeddings"], route_class=DirectRoute), Preparers()

    async def rerank(request: Request) -> Response:
        body = await read_body(request, RerankRequest, limit=gateway.config.limits.body_bytes)
        return await unless_gone(request, _rerank(gateway, request, body, preparers))

    told = described(RerankRequest, "Documents in order of their relevance to a query")
    router.add_api_route("/v1/rerank", rerank, methods=["POST"], **told)
    for alias in ("/v2/rerank", "/rerank"):  # where Cohere's and infinity's clients look
        router.add_api_route(alias, rerank, methods=["POST"], **told)
    return router


async def _rerank(gateway: Gateway, request: Request, body: RerankRequest, preparers: Preparers) -> Response:
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    check_size([body.query, *texts], gateway.config.limits)
    seen = visible(gateway, request)
    crossed = seen.engines.get(body.model or "")
    if crossed and crossed.config.task == "cross_encoder":
        return await _crossed(seen, crossed, request, body, texts)
    async with AsyncExitStack() as stack:
        cost = guessed(sum(map(len, [body.query, *texts])))
        budget = await stack.enter_async_context(seen.limited(cost))
        name, is_set = asked(request, given=await seen.named(body.adapter), is_set="adapter" in body.model_fields_set)
        choice = choose(seen, task="embedding", model=body.model, adapter=name, is_set=is_set)
        resident = await stack.enter_async_context(seen.lease(choice.adapter)) if choice.adapter else None
        adapter = seen.counted(resident)
        ticket = await stack.enter_async_context(seen.placed(budget, choice.engine, adapter, route="rerank", cost=cost))
        query_way = way_of(choice.engine, resident, input_type="query", dimensions=None)
        document_way = way_of(choice.engine, resident, input_type="document", dimensions=None)
        query, documents = await together(
            [
                embed(query_way, [body.query], preparers, input_type="query", truncate=True),
                embed(document_way, texts, preparers, input_type="document", truncate=True),
            ]
        )
        tokens = query.tokens + documents.tokens
        ticket.count({"prompt_tokens": tokens})
    headers = {
        "x-embedft-adapter": resident.id if resident else BASE,
        "x-embedft-base": choice.engine.name,
        "x-embedft-lineage": query_way.lineage,
    }
    scores = unit(documents.rows) @ unit(query.rows)[0]
    return _answer(
        resident.name if resident else choice.engine.name, scores, texts, body, headers, tokens, query.truncated + documents.truncated
    )


async def _crossed(seen: Visible, engine: Engine, request: Request, body: RerankRequest, texts: list[str]) -> Response:
    if "adapter" in request.query_params or body.adapter is not None:
        raise InputInvalid("adapter_conflict", f"{engine.name!r} is a cross-encoder, which has no adapters", "adapter")
    async with seen.admitted(engine, None, route="rerank", cost=guessed(sum(len(body.query) + len(text) for text in texts))) as ticket:
        made = await engine.asked(lambda client: client.call("/v1/score", {"query": body.query, "documents": texts}))
        ticket.count({"prompt_tokens": made["tokens"]})
    scores = np.asarray(made["scores"], dtype=np.float32)
    headers = {"x-embedft-adapter": BASE, "x-embedft-base": engine.name}
    return _answer(engine.name, scores, texts, body, headers, made["tokens"], made["truncated"])


def _answer(
    model: str, scores: NDArray[np.float32], texts: list[str], body: RerankRequest, headers: dict[str, str], tokens: int, truncated: int
) -> Response:
    content = {
        "id": f"rerank-{uuid.uuid4().hex}",
        "object": "rerank",
        "created": int(time.time()),
        "model": model,
        "results": _ordered(scores, texts, body),
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "truncated": truncated,
    }
    return Response(to_json(content), media_type="application/json", headers=headers)


def _ordered(scores: NDArray[np.float32], texts: list[str], body: RerankRequest) -> list[dict[str, object]]:
    """The best `top_n`, best first; of equal ones the earlier document first."""
    order = [int(index) for index in np.argsort(-scores, kind="stable")[: body.top_n]]
    results: list[dict[str, object]] = [{"index": index, "relevance_score": float(scores[index])} for index in order]
    if body.return_documents:
        results = [{**result, "document": {"text": texts[index]}} for result, index in zip(results, order, strict=True)]
    return results
