"""The link between gateway and engine: a real uvicorn on a Unix socket, asked by both ends of ours and by plain HTTP."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from serve.leaving import ClientGone, unless_gone
from serve.link import engine, frames
from serve.link.engine import PATIENCE, protocol
from serve.link.frames import HEAD, HELLO, LARGEST, LAST, Framed
from serve.link.gateway import HELD, Link

PART = b"x" * 10_000


class Told(StreamingResponse):
    """Tells when it has ended, in whatever way."""

    def __init__(self, parts: AsyncIterator[bytes], left: list[str]) -> None:
        super().__init__(parts)
        self.left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.left.append(scope["path"])


@dataclass
class App:
    """Its routes, and what they saw."""

    made: int = 0
    left: list[str] = field(default_factory=list[str])
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def starlette(self) -> Starlette:
        async def echo(request: Request) -> Response:
            headers = {name: request.headers.get(name) for name in ("authorization", "content-type", "content-length")}
            shown = {"method": request.method, "path": request.url.path, "query": request.url.query, **headers}
            return JSONResponse({**shown, "body": (await request.body()).decode()}, status_code=418)

        async def big(request: Request) -> Response:
            return Response(await request.body())

        async def wait(request: Request) -> Response:
            await request.body()
            try:
                await unless_gone(request, self.gate.wait())
            except ClientGone:
                self.left.append("/wait")
            return Response("waited")

        async def words() -> AsyncIterator[bytes]:
            for word in (b"one", b"two", b"three"):
                yield word
                await asyncio.sleep(0.02)

        async def endless() -> AsyncIterator[bytes]:
            while True:
                self.made += 1
                yield PART

        async def quick() -> AsyncIterator[bytes]:
            for number in range(50):
                yield b"%d " % number
                await asyncio.sleep(0.001)

        async def broken() -> AsyncIterator[bytes]:
            yield b"half"
            raise RuntimeError("planted")

        def streamed(parts: Callable[[], AsyncIterator[bytes]]) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            async def answer(request: Request) -> Response:
                await request.body()
                return Told(parts(), self.left)

            return answer

        named = {"/echo": echo, "/big": big, "/wait": wait}
        named |= {f"/{parts.__name__}": streamed(parts) for parts in (words, quick, endless, broken)}
        return Starlette(routes=[Route(path, run, methods=["GET", "POST"]) for path, run in named.items()])


@asynccontextmanager
async def serving(where: Path, **answered: Any) -> AsyncGenerator[tuple[App, uvicorn.Server, asyncio.Task[None]]]:
    app, http = App(), protocol(**answered)
    server = uvicorn.Server(uvicorn.Config(app.starlette(), uds=str(where), http=http, log_level="critical", lifespan="off"))
    task = asyncio.create_task(server._serve())  # pyright: ignore[reportPrivateUsage]  # without its signal handlers
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield app, server, task
    finally:
        server.should_exit = server.force_exit = True
        await task


@asynccontextmanager
async def linked(folder: Path) -> AsyncGenerator[tuple[App, Link]]:
    async with serving(folder / "e.sock") as (app, _, _):
        link = Link(str(folder / "e.sock"), "secret")
        try:
            yield app, link
        finally:
            link.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


def test_a_call_is_the_request_that_http_would_make(tmp_path: Path) -> None:
    async def run() -> None:
        async with linked(tmp_path) as (_, link):
            async with link.call("/echo?a=1", "héllo\n".encode()) as reply:
                status, content = reply.status, await reply.read()
            transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "e.sock"))
            headers = {"authorization": "Bearer secret", "content-type": "application/json"}
            async with httpx.AsyncClient(transport=transport, base_url="http://engine", headers=headers) as http:
                plain = await http.post("/echo?a=1", content="héllo\n".encode())
            assert (status, content) == (plain.status_code, plain.content)
            assert b'"method":"POST"' in content
            assert b'"authorization":"Bearer secret"' in content
            async with link.call("/nowhere", b"", method="GET") as reply:
                assert reply.status == 404

    asyncio.run(run())


def test_calls_do_not_wait_for_each_other(tmp_path: Path) -> None:
    async def run() -> None:
        async with linked(tmp_path) as (app, link):
            async with link.call("/words", b"") as slow:
                parts = [slow.parts()]
                assert await anext(parts[0]) == b"one"
                for _ in range(20):
                    async with link.call("/big", b"quick") as reply:
                        assert await reply.read() == b"quick"
                assert b"".join([part async for part in parts[0]]) == b"twothree"
            waiting = [asyncio.create_task(read(link, "/wait")) for _ in range(50)]
            await asyncio.sleep(0.05)
            app.gate.set()
            assert await asyncio.gather(*waiting) == [b"waited"] * 50

    asyncio.run(run())


async def read(link: Link, path: str, body: bytes = b"") -> bytes:
    async with link.call(path, body) as reply:
        return await reply.read()


def test_bodies_larger_than_any_buffer_go_through_whole(tmp_path: Path) -> None:
    async def run() -> None:
        async with linked(tmp_path) as (_, link):
            bodies = [bytes([number]) * (5_000_000 + number) for number in range(4)]

            async def there_and_back(body: bytes) -> bool:
                async with link.call("/big", body) as reply:
                    return await reply.read() == body

            assert all(await asyncio.gather(*map(there_and_back, bodies)))

    asyncio.run(run())


def test_leaving_a_call_tells_the_engine(tmp_path: Path) -> None:
    async def run() -> None:
        async with linked(tmp_path) as (app, link):
            async with link.call("/endless", b"") as reply:
                async for part in reply.parts():
                    assert part.startswith(PART)
                    break
            await until(lambda: app.left == ["/endless"])
            waiting = asyncio.create_task(read(link, "/wait"))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await until(lambda: app.left == ["/endless", "/wait"])

    asyncio.run(run())


def test_a_slow_reader_is_waited_for_and_nobody_else_is(tmp_path: Path) -> None:
    async def run() -> None:
        async with linked(tmp_path) as (app, link), link.call("/endless", b"") as slow:
            await asyncio.sleep(0.3)
            made = app.made
            assert await read(link, "/words") == b"onetwothree"
            assert app.made == made < 50 * HELD / len(PART)
            parts = slow.parts()
            taken = len(await anext(parts))
            assert taken < 50 * HELD
            await until(lambda: app.made > made)
            assert len(await anext(parts)) > 0

    asyncio.run(run())


@pytest.mark.parametrize("pace", [10.0, 0.0])
def test_pieces_of_a_stream_that_come_faster_than_the_pace_leave_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pace: float
) -> None:
    """The first two leave at once, and the last takes along what waits: nobody learns later that an answer has begun, or ended."""
    for module in (frames, engine):
        monkeypatch.setattr(module, "PACE", pace)

    async def run() -> None:
        async with linked(tmp_path) as (_, link), asyncio.timeout(8), link.call("/quick", b"") as reply:
            parts = [part async for part in reply.parts()]
            assert parts[0].startswith(b"0 ")
            assert b"".join(parts) == b"".join(b"%d " % number for number in range(50))
            assert b"".join(parts[:-1]) == b"0 1 " if pace else len(parts) > 25

    asyncio.run(run())


def test_what_may_wait_leaves_after_the_pace_or_with_what_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = 0.4
    monkeypatch.setattr(frames, "PACE", pace)

    async def run() -> None:
        sent: list[bytes] = []
        times: list[float] = []

        def write(data: bytes) -> None:
            sent.append(data)
            times.append(asyncio.get_running_loop().time())

        end = Framed(lambda *_: None, lambda: None)
        end.connection_made(cast("Any", SimpleNamespace(write=write, is_closing=lambda: False)))
        end.write(1, 0, b"first", may_wait=True)
        await until(lambda: len(sent) == 1)
        for piece in (b"second", b"third", b"fourth"):
            end.write(1, 0, piece, may_wait=True)
        await until(lambda: len(sent) == 2)
        assert [b"third" in one for one in sent] == [False, True]
        assert times[1] - times[0] > 0.9 * pace
        end.write(1, 0, b"fifth", may_wait=True)
        await asyncio.sleep(pace / 2)
        end.write(2, LAST, b"another's")
        await until(lambda: len(sent) == 3)
        assert b"fifth" in sent[2]
        assert sent[2].endswith(b"another's")
        end.write(1, 0, b"sixth", may_wait=True)
        await until(lambda: len(sent) == 4)
        assert times[3] - times[2] > 0.9 * pace  # its own, not what was left of the fifth's

    asyncio.run(run())


def test_an_answer_that_breaks_off_is_no_answer(tmp_path: Path) -> None:
    async def run() -> None:
        async with linked(tmp_path) as (_, link):
            with pytest.raises(ConnectionError, match="broke the answer off"):
                await read(link, "/broken")
            assert await read(link, "/words") == b"onetwothree"

    asyncio.run(run())


def test_an_engine_that_goes_away_fails_its_calls_and_is_found_again(tmp_path: Path) -> None:
    where = tmp_path / "e.sock"

    async def run() -> None:
        link = Link(str(where), "secret")
        with pytest.raises(FileNotFoundError):
            await read(link, "/words")
        async with serving(where) as (_, server, _):
            waiting = asyncio.create_task(read(link, "/wait"))
            await asyncio.sleep(0.05)
            for connection in list(server.server_state.connections):
                connection.http.transport.abort()  # pyright: ignore[reportAttributeAccessIssue]  # as its death would
            with pytest.raises(ConnectionError, match="went away"):
                await waiting
        async with serving(where):
            assert await read(link, "/words") == b"onetwothree"
        link.close()

    asyncio.run(run())


def test_a_server_that_is_told_to_stop_ends_its_calls_first(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path / "e.sock") as (_, server, task):
            link = Link(str(tmp_path / "e.sock"), "secret")
            async with link.call("/words", b"") as reply:
                server.should_exit = True
                assert await reply.read() == b"onetwothree"
            await asyncio.wait_for(task, 5)  # the link itself keeps nobody

    asyncio.run(run())


@pytest.mark.parametrize("sent", [HELLO + b"k" * PATIENCE * 2, HELLO + b"k\n" + HEAD.pack(LARGEST + 1, 1, 0)], ids=["hello", "frame"])
def test_what_never_ends_is_hung_up_on(tmp_path: Path, sent: bytes) -> None:
    async def run() -> None:
        async with serving(tmp_path / "e.sock"):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(tmp_path / "e.sock"))
                raw.sendall(sent)
                raw.settimeout(5)
                assert await asyncio.to_thread(raw.recv, 10) == b""

    asyncio.run(run())


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), st.binary(max_size=40)), max_size=8), st.data())
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames: list[tuple[int, int, bytes]], data: st.DataObject) -> None:
    async def run() -> list[tuple[int, int, bytes]]:
        found: list[tuple[int, int, bytes]] = []
        end = Framed(lambda call, kind, content: found.append((call, kind, content)), lambda: None)
        whole = b"".join(HEAD.pack(len(content), call, kind) + content for call, kind, content in frames)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=10)))
        for start, stop in zip([0, *cuts], [*cuts, len(whole)], strict=True):
            end.data_received(whole[start:stop])
        return found

    assert asyncio.run(run()) == frames
