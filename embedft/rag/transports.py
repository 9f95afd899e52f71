"""httpx transports for clients that are used from many event loops, and for a language model in this process behind OpenAI's chat.

llama-index runs coroutines in event loops of their own, and a pool of connections belongs to the loop that it was opened in.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

import httpx

from embedft.rag.engines import Reader

Keeper = AsyncGenerator[httpx.AsyncHTTPTransport, None]


class LoopTransport(httpx.AsyncBaseTransport):
    """A pool for each event loop, closed with it: a loop's end closes the async generators that were begun in it."""

    def __init__(self) -> None:
        self._pools: dict[asyncio.AbstractEventLoop, tuple[httpx.AsyncHTTPTransport, Keeper]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            keeper = self._pool(loop)
            self._pools[loop] = (await anext(keeper), keeper)
        return await self._pools[loop][0].handle_async_request(request)

    async def _pool(self, loop: asyncio.AbstractEventLoop) -> Keeper:
        try:
            async with httpx.AsyncHTTPTransport() as transport:
                yield transport
        finally:
            self._pools.pop(loop, None)


class ReaderTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """OpenAI's chat, answered by a Reader in this process. Its errors pass through the client as they are raised.

    `reader` is called at the first request: a model loads when it is needed.
    """

    def __init__(self, reader: Callable[[], Reader]) -> None:
        self._reader = reader

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        messages, options, streamed = _asked(request.read())
        if streamed:
            return _events(_sent(self._reader().stream(messages, **options)))
        return _whole(self._reader().chat(messages, **options))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        messages, options, streamed = _asked(await request.aread())
        if streamed:
            return _events(_asent(self._reader().astream(messages, **options)))
        return _whole(await self._reader().achat(messages, **options))


def _asked(body: bytes) -> tuple[list[dict[str, str]], dict[str, Any], bool]:
    """(messages, the reader's options, whether a stream is wanted)."""
    options = json.loads(body)
    options.pop("model", None)
    messages, streamed = options.pop("messages"), bool(options.pop("stream", False))
    return messages, {"adapter": None, **options}, streamed


_HEAD: dict[str, Any] = {"id": "in-process", "created": 0, "model": "base"}


def _whole(said: str) -> httpx.Response:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    return httpx.Response(200, json={**_HEAD, "object": "chat.completion", "choices": [choice]})


def _events(content: Iterator[bytes] | AsyncIterator[bytes]) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=content)


def _event(piece: str) -> bytes:
    choice = {"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": piece}}
    return b"data: " + json.dumps({**_HEAD, "object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"


def _sent(pieces: Iterator[str]) -> Iterator[bytes]:
    yield from map(_event, pieces)
    yield b"data: [DONE]\n\n"


async def _asent(pieces: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        yield _event(piece)
    yield b"data: [DONE]\n\n"
