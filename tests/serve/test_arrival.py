"""What comes before there is a request: heads that never end or never come, and connections that say nothing."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from serve import arrival
from serve.arrival import HEAD_BYTES, Arrival

START = b"GET / HTTP/1.1\r\nhost: localhost\r\n"
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected() -> AsyncGenerator[Ends]:
    """A connection to a server that answers everything with 'here'."""
    server = uvicorn.Server(uvicorn.Config(PlainTextResponse("here"), http=Arrival, lifespan="off", log_level="critical", port=0))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    reader, writer = await asyncio.open_connection(host, port)
    try:
        async with asyncio.timeout(20):
            yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await serving


async def answered(ends: Ends, content: bytes) -> bytes:
    """The answer to one request of a connection that is kept."""
    ends[1].write(content)
    head = await ends[0].readuntil(b"\r\n\r\n")
    assert await ends[0].readexactly(4) == b"here"
    return head


@pytest.mark.anyio
@pytest.mark.parametrize("part", [b"a" * 4096, b"x: 1\r\n" * 700], ids=["one header", "many"])
async def test_a_head_that_does_not_end_is_refused_before_it_takes_memory(part: bytes) -> None:
    async with connected() as (reader, writer):
        writer.write(START + b"x: ")
        sent, told = 0, asyncio.create_task(reader.read())
        while not told.done() and sent < 100 * HEAD_BYTES:
            writer.write(part)
            sent += len(part)
            await asyncio.sleep(0.001)
        answer = await told
        assert answer.startswith(b"HTTP/1.1 431 "), answer
        assert b"head_too_large" in answer
        assert sent < 10 * HEAD_BYTES


@pytest.mark.anyio
@pytest.mark.parametrize("content", [b"", START], ids=["nothing", "a half"])
async def test_a_head_that_does_not_come_is_not_waited_for(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "HEAD_SECONDS", 0.2)
    async with connected() as (reader, writer):
        writer.write(content)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 "), answer
        assert b"head_timeout" in answer
    async with connected() as ends:
        await answered(ends, START + b"\r\n")
        ends[1].write(content or START)
        assert b"408" in await ends[0].read()


@pytest.mark.anyio
async def test_a_connection_that_is_kept_may_send_any_number_of_heads_and_a_body_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "HEAD_SECONDS", 0.5)
    async with connected() as ends:
        for _ in range(5):
            head = START + b"x: " + b"a" * (HEAD_BYTES // 2)
            ends[1].write(head)
            await asyncio.sleep(0.15)
            assert b" 200 " in await answered(ends, b"\r\n\r\n")
        body = START.replace(b"GET", b"POST") + b"content-length: %d\r\n\r\n" % (8 * HEAD_BYTES)
        assert b" 200 " in await answered(ends, body + b"a" * (8 * HEAD_BYTES))
