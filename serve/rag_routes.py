"""/v1/rag: questions answered from indexes, the adapters of retriever and reader chosen per request. The only importer of embedft.rag.

Embedding and generation go straight to the engines, through the same leases, prompts and meters as any other request.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from embedft.errors import IndexInvalid, IndexNotFound, InputInvalid, RagError
from embedft.rag.answer import Source, cited, messages_of, sources_of
from embedft.rag.engines import Labelled
from embedft.rag.index import Found, VectorIndex
from embedft.rag.search import Stages, search
from embedft.vectors import unit
from serve.admin_routes import ADMIN_BODY
from serve.admission import guessed
from serve.body import read_body
from serve.embedding import Preparers, Way, embed, way_of
from serve.engine import BASE
from serve.gateway import Gateway
from serve.generation_routes import SALTED, Call, OwnedStream, check_template
from serve.leaving import unless_gone
from serve.openapi import described
from serve.routing import Choice, choose
from serve.schemas import PutIndex, RagRequest
from serve.visible import Visible, visible
from serve.who import admin_only

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RERANKED = 20


class Indexes:
    """The indexes served, by name. One that cannot be opened never replaces one that serves."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.live: dict[str, VectorIndex] = {}
        self.refused: dict[str, str] = {}
        for folder in sorted(root.iterdir()) if root.is_dir() else []:
            if NAME.fullmatch(folder.name) and (folder / "current").is_file():
                try:
                    self.live[folder.name] = VectorIndex.open(folder)
                except RagError as error:
                    self.refused[folder.name] = str(error)

    def get(self, name: str) -> VectorIndex:
        """The version that serves. IndexNotFound."""
        if name not in self.live:
            raise IndexNotFound(name[:80], list(self.live))
        return self.live[name]

    def put(self, name: str, *, expected: str | None) -> VectorIndex:
        """Open the version on disk, every byte checked, and let it serve from now on. What was serving stays where that fails."""
        if not NAME.fullmatch(name):
            raise IndexNotFound(name[:80], list(self.live))
        folder = self.root / name
        if folder.is_symlink():
            raise IndexInvalid(name, "it is a link: put the index itself into the server's folder")
        try:
            opened = VectorIndex.open(folder, verify=True)
            if expected is not None and opened.version != expected:
                raise IndexInvalid(name, f"its version is {opened.version}, not {expected}: read it again and retry")
        except IndexNotFound:
            raise
        except RagError as error:
            self.refused[name] = str(error)
            raise
        self.refused.pop(name, None)
        self.live[name] = opened  # requests that hold the old one finish on it
        return opened

    def delete(self, name: str) -> VectorIndex:
        self.get(name)
        return self.live.pop(name)


def rag_routes(gateway: Gateway) -> APIRouter:
    """Routes over the indexes under the server's `indexes` folder."""
    assert gateway.config.indexes is not None
    router, indexes, preparers = APIRouter(tags=["rag"]), Indexes(gateway.config.indexes), Preparers()
    only_admin = admin_only(gateway)

    @router.get("/v1/rag", summary="All indexes: served, and those that cannot be, with the reason")
    def listed(request: Request) -> Response:
        may = visible(gateway, request).tenant.may_search
        rows = [{**view(index), **_reason(indexes, name)} for name, index in indexes.live.items() if may(name)]
        refused = {name: why for name, why in indexes.refused.items() if name not in indexes.live and may(name)}
        rows += [{"name": name, "state": "unserved", "refused": why} for name, why in refused.items()]
        return _json({"object": "list", "data": sorted(rows, key=lambda row: row["name"])})

    @router.get("/v1/rag/{index}", summary="One index")
    def one(index: str, request: Request) -> Response:
        return _json({**view(allowed(index, request)), **_reason(indexes, index)})

    put_body = described(PutIndex, "Load an index, or replace it by its newest version: one step, and a damaged one leaves the old serving")

    @router.put("/v1/rag/{index}", dependencies=only_admin, **put_body)
    async def put(index: str, request: Request) -> Response:
        body = await read_body(request, PutIndex, limit=ADMIN_BODY)
        return _json(view(await asyncio.to_thread(indexes.put, index, expected=body.expected_version)))

    @router.delete("/v1/rag/{index}", dependencies=only_admin, summary="Stop serving; the folder keeps it")
    def delete(index: str) -> Response:
        return _json({**view(indexes.delete(index)), "state": "unserved"})

    @router.post(
        "/v1/rag/{index}/query", **described(RagRequest, "Find passages by one adapter and answer from them by another; sources first")
    )
    async def query(index: str, request: Request) -> Response:
        body = await read_body(request, RagRequest, limit=gateway.config.limits.body_bytes)
        return await _query(visible(gateway, request), request, allowed(index, request), body, preparers)

    def allowed(name: str, request: Request) -> VectorIndex:
        tenant = visible(gateway, request).tenant
        if tenant.may_search(name) and name in indexes.live:
            return indexes.live[name]
        raise IndexNotFound(name[:80], [known for known in indexes.live if tenant.may_search(known)])

    return router


def view(index: VectorIndex) -> dict[str, Any]:
    """What clients see of an index; no path of this machine."""
    return {
        "name": index.name,
        "state": "serving",
        "version": index.version,
        "lineage": index.lineage,
        "made_by": index.made_by,
        "adapter": index.adapter,
        "chunks": len(index),
        "dimension": index.dimension,
        "kind": index.kind,
        "bm25": index.bm25 is not None,
    }


@dataclass(frozen=True)
class _Retrieved:
    """`map_recall`: of the linear map that the question went through, if it did."""

    sources: list[Source]
    headers: dict[str, str]
    map_recall: float | None = None


async def _query(seen: Visible, request: Request, index: VectorIndex, body: RagRequest, preparers: Preparers) -> Response:
    _check(seen.gateway, body)
    reader = None
    if body.answer:
        reader = choose(seen, task="causal_lm", model=body.lm_model, adapter=body.lm_adapter, is_set=_is_set(body, "lm_adapter"))
    found = await unless_gone(request, _retrieve(seen, index, body, preparers))
    shown: dict[str, Any] = {
        "index": index.name,
        "version": index.version,
        "question": body.question,
        "sources": [asdict(one) for one in found.sources],
    }
    if found.map_recall is not None:
        shown["map_recall"] = round(found.map_recall, 4)
    if reader is None:
        return Response(to_json({"object": "rag.sources", **shown}), media_type="application/json", headers=found.headers)
    return await _answer(seen, request, body, reader, found, shown)


def _check(gateway: Gateway, body: RagRequest) -> None:
    limits = gateway.config.limits
    if body.max_tokens > limits.max_tokens:
        raise InputInvalid("max_tokens_too_large", f"at most {limits.max_tokens} tokens in one answer", "max_tokens")
    if len(body.question) > limits.text_characters:
        raise InputInvalid("input_too_large", f"more than {limits.text_characters} characters in one request", "question")
    if body.stream and not body.answer:
        raise InputInvalid("stream_without_answer", "sources come whole: stream is for an answer", "stream")


async def _retrieve(seen: Visible, index: VectorIndex, body: RagRequest, preparers: Preparers) -> _Retrieved:
    if body.fusion == "sparse":
        return await _by_words(seen, index, body, preparers)
    name = body.adapter if _is_set(body, "adapter") or body.model else index.adapter
    async with AsyncExitStack() as stack:
        query, document = await _ways(seen, stack, body.model, name, is_set=name is not None or _is_set(body, "adapter"))
        fitted = index.map_from(document.lineage) if body.mapped and document.lineage != index.lineage else None
        if fitted is None:
            index.check(lineage=document.lineage, made_by=query.label)  # before an engine works for nothing
        adapter = seen.counted(query.resident)
        async with seen.admitted(query.engine, adapter, route="rag", cost=guessed(len(body.question))) as ticket:
            made = await embed(query, [body.question], preparers, input_type="query", truncate=True)
            ticket.count({"prompt_tokens": made.tokens})
            labels = {"lineage": query.lineage, "documents": document.lineage, "made_by": query.label}
            vector = Labelled(made.rows[0].tolist(), **labels)
            stages = Stages(k=_wanted(body), fusion=body.fusion, weight=float(body.weight), mapped=body.mapped)
            found = await asyncio.to_thread(search, index, body.question, vector, stages)
    found = await _reranked(seen, body, found, preparers)
    headers = {"x-embedft-adapter": query.label, "x-embedft-base": query.engine.name, "x-embedft-lineage": query.lineage}
    headers["x-embedft-index"] = f"{index.name}@{index.version}"
    return _Retrieved(sources_of(found[: body.k]), headers, fitted.recall if fitted else None)


async def _by_words(seen: Visible, index: VectorIndex, body: RagRequest, preparers: Preparers) -> _Retrieved:
    """BM25 alone: no engine is asked and no header names a maker of vectors; an adapter that is named must be there all the same."""
    if body.adapter or body.model:
        choose(seen, task="embedding", model=body.model, adapter=body.adapter, is_set=_is_set(body, "adapter"))
    async with seen.limited(guessed(len(body.question))):
        found = await asyncio.to_thread(search, index, body.question, None, Stages(k=_wanted(body), fusion="sparse"))
    found = await _reranked(seen, body, found, preparers)
    return _Retrieved(sources_of(found[: body.k]), {"x-embedft-index": f"{index.name}@{index.version}"})


def _wanted(body: RagRequest) -> int:
    return max(body.k, RERANKED) if body.rerank_adapter else body.k


async def _ways(seen: Visible, stack: AsyncExitStack, model: str | None, name: str | None, *, is_set: bool) -> tuple[Way, Way]:
    """How `name` (None: the base) embeds queries and documents; it stays loaded as long as `stack` is open."""
    choice = choose(seen, task="embedding", model=model, adapter=name, is_set=is_set)
    resident = await stack.enter_async_context(seen.lease(choice.adapter)) if choice.adapter else None
    query = way_of(choice.engine, resident, input_type="query", dimensions=None)
    return query, way_of(choice.engine, resident, input_type="document", dimensions=None)


async def _reranked(seen: Visible, body: RagRequest, found: list[Found], preparers: Preparers) -> list[Found]:
    """What was found, in the order of another adapter's vectors where one is named; the scores are that adapter's."""
    if not body.rerank_adapter or not found:
        return found
    async with AsyncExitStack() as stack:
        query, document = await _ways(seen, stack, None, body.rerank_adapter, is_set=True)
        texts = [hit.chunk.whole for hit in found]
        adapter = seen.counted(query.resident)
        async with seen.admitted(query.engine, adapter, route="rerank", cost=guessed(sum(map(len, texts)))) as ticket:
            asked = await embed(query, [body.question], preparers, input_type="query", truncate=True)
            made = await embed(document, texts, preparers, input_type="document", truncate=True)
            ticket.count({"prompt_tokens": asked.tokens + made.tokens})
    scores = unit(made.rows) @ unit(asked.rows)[0]
    order = sorted(range(len(found)), key=lambda place: -scores[place])
    return [Found(found[place].row, float(scores[place]), found[place].chunk) for place in order]


async def _answer(
    seen: Visible, request: Request, body: RagRequest, reader: Choice, found: _Retrieved, shown: Mapping[str, Any]
) -> Response:
    async with AsyncExitStack() as stack:
        written = await unless_gone(request, _written(stack, seen, body, reader, found, shown))
        if isinstance(written, Response):
            return written
        lines, headers = written
        return OwnedStream(_sources_first(shown, lines), stack.pop_all(), headers=headers)


async def _written(
    stack: AsyncExitStack, seen: Visible, body: RagRequest, reader: Choice, found: _Retrieved, shown: Mapping[str, Any]
) -> Response | tuple[AsyncIterator[bytes], dict[str, str]]:
    """The answer, or of one that is streamed its lines and headers; what they need is held by `stack`."""
    resident = await stack.enter_async_context(seen.lease(reader.adapter)) if reader.adapter else None
    reader.engine.supervisor.require_ready()
    if resident:
        check_template(resident)
    adapter = seen.counted(resident)
    cost = guessed(sum(len(source.text) for source in found.sources), body.max_tokens)
    ticket = await stack.enter_async_context(seen.admitted(reader.engine, adapter, route="rag", cost=cost))
    call = Call(reader, resident, ticket, began=seen.record.began)
    headers = {**found.headers, "x-embedft-lm-adapter": call.headers["x-embedft-adapter"], "x-embedft-lm-base": reader.engine.name}
    sent: dict[str, Any] = {"model": resident.id if resident else BASE, "messages": messages_of(body.question, found.sources)}
    sent |= {"max_tokens": body.max_tokens, "temperature": body.temperature}
    if reader.engine.config.engine in SALTED:
        sent["cache_salt"] = seen.gateway.tenants.salt(seen.tenant)
    if body.stream:
        sent |= {"stream": True, "stream_options": {"include_usage": True}}
        events = await stack.enter_async_context(reader.engine.client.stream("/v1/chat/completions", sent))
        lines = call.relabelled(events, usage_wanted=False)
        return lines, headers
    answer = await reader.engine.client.call("/v1/chat/completions", sent)
    ticket.count(answer.get("usage"))
    said = str(answer["choices"][0]["message"].get("content") or "")
    content = {"object": "rag.answer", **shown, "answer": said, "cited": cited(said, found.sources), "usage": answer.get("usage")}
    return Response(to_json(content), media_type="application/json", headers=headers)


async def _sources_first(shown: Mapping[str, Any], lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield b"data: " + to_json({"object": "rag.sources", **shown}) + b"\n\n"
    async for line in lines:
        yield line


def _is_set(body: RagRequest, field: str) -> bool:
    return field in body.model_fields_set


def _reason(indexes: Indexes, name: str) -> dict[str, str]:
    """A newer version that was refused, beside the one that serves."""
    return {"refused": indexes.refused[name]} if name in indexes.refused else {}


def _json(content: Any) -> Response:
    return Response(to_json(content), media_type="application/json")
