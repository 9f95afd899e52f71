"""Clients in many event loops, and what is left open by them."""

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator

import httpx
import pytest

from embedft.rag import AdapterEmbedding, AdapterLLM
from embedft.rag.transports import LoopTransport
from tests.serve.world import Server


def test_each_event_loop_has_a_pool_that_ends_with_it(server: Server) -> None:
    transport = LoopTransport()
    client = httpx.AsyncClient(transport=transport, base_url=server.url)

    async def twice() -> int:
        for _ in range(2):
            assert (await client.get("/health")).status_code == 200
        return len(transport._pools)

    assert [asyncio.run(twice()) for _ in range(3)] == [1, 1, 1]
    assert not transport._pools


def test_nothing_is_left_open_by_calls_streams_and_abandoned_streams(server: Server) -> None:
    gc.collect()  # what other tests left behind is not this one's
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        embedding, llm = AdapterEmbedding(url=server.url, adapter="a"), AdapterLLM(url=server.url, adapter="s", max_tokens=4)
        embedding.get_query_embedding("x")
        asyncio.run(embedding.aget_query_embedding("x"))
        asyncio.run(_first(llm))
        next(iter(llm.stream_complete("x")))
        asyncio.run(embedding.aget_text_embedding_batch(["x", "y"], adapter="b"))
        del embedding, llm
        gc.collect()
    assert [str(one.message) for one in caught if issubclass(one.category, ResourceWarning)] == []


async def _first(llm: AdapterLLM) -> None:
    pieces: AsyncIterator[object] = await llm.astream_complete("x")
    await anext(pieces)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_model_in_this_process_streams_the_same_answer_through_openais_client(asynchronous: bool) -> None:
    llm = AdapterLLM(base="seed-lm", max_tokens=6)

    async def said() -> str:
        return "".join([piece.delta or "" async for piece in await llm.astream_complete("Say one word.")])

    streamed = asyncio.run(said()) if asynchronous else "".join(piece.delta or "" for piece in llm.stream_complete("Say one word."))
    assert streamed == llm.complete("Say one word.").text
    assert len(llm.complete("Say one word.", max_tokens=2).text) < len(streamed)  # a call's option wins over the setting
