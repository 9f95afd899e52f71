"""Calls of the link that are answered without the app."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from serve.link.frames import CALL, CANCEL, HEAD, HELLO
from serve.link.gateway import HELD, Link
from tests.serve.test_link import PART, read, serving, until


def test_what_is_answered_straight_is_so_for_who_has_the_key_and_for_nobody_else(tmp_path: Path) -> None:
    asked: list[bytes] = []

    async def short(body: bytes) -> tuple[int, bytes]:
        asked.append(body)
        if body == b"broken":
            raise RuntimeError("planted")
        return 207, body[::-1]

    async def run() -> None:
        where = tmp_path / "e.sock"
        async with serving(where, straight={"/big": short}, key="secret"):
            link, other = Link(str(where), "secret"), Link(str(where), "another")
            async with link.call("/big", b"abc") as reply:
                assert (reply.status, await reply.read()) == (207, b"cba")
            with pytest.raises(ConnectionError, match="broke the answer off"):
                await read(link, "/big", b"broken")
            assert await read(link, "/words") == b"onetwothree"
            assert await read(other, "/big", b"abc") == b"abc"  # by the app, which looks at keys itself
            assert asked == [b"abc", b"broken"]
            link.close()
            other.close()

    asyncio.run(run())


def test_what_is_answered_straight_in_parts_is_paused_and_ended_with_the_call(tmp_path: Path) -> None:
    made, left = [0], list[str]()

    async def parts() -> AsyncGenerator[bytes]:
        try:
            while True:
                made[0] += 1
                yield PART
        finally:
            left.append("parts")

    async def three() -> AsyncGenerator[bytes]:
        for word in (b"one", b"two", b"three"):
            yield word
            await asyncio.sleep(0.01)

    async def half() -> AsyncGenerator[bytes]:
        yield b"half"
        raise RuntimeError("planted")

    async def late(_: bytes) -> tuple[int, bytes]:
        try:
            await asyncio.sleep(60)
        finally:
            left.append("late")
        return 200, b""

    def streamed(of: Callable[[], AsyncGenerator[bytes]]) -> Callable[[bytes], Coroutine[Any, Any, tuple[int, AsyncGenerator[bytes]]]]:
        async def answer(_: bytes) -> tuple[int, AsyncGenerator[bytes]]:
            return 200, of()

        return answer

    async def run() -> None:
        where = tmp_path / "e.sock"
        straight = {"/parts": streamed(parts), "/three": streamed(three), "/half": streamed(half), "/late": late}
        async with serving(where, straight=straight, key="secret"):
            link = Link(str(where), "secret")
            assert await read(link, "/three") == b"onetwothree"
            with pytest.raises(ConnectionError, match="broke the answer off"):
                await read(link, "/half")
            async with link.call("/parts", b"") as slow:
                await asyncio.sleep(0.3)
                so_far = made[0]
                assert await read(link, "/three") == b"onetwothree"
                assert made[0] == so_far < 50 * HELD / len(PART)
                assert (await anext(slow.parts())).startswith(PART)
            await until(lambda: left == ["parts"])
            waiting = asyncio.create_task(read(link, "/late"))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await until(lambda: left == ["parts", "late"])
            link.close()

    asyncio.run(run())


def test_a_call_that_is_given_up_before_it_has_begun_keeps_nobody(tmp_path: Path) -> None:
    async def never(_: bytes) -> tuple[int, bytes]:
        raise AssertionError

    async def run() -> None:
        where = tmp_path / "e.sock"
        async with serving(where, straight={"/never": never}, key="secret") as (_, server, task):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(where))
                raw.sendall(HELLO + b"secret\n" + HEAD.pack(12, 1, CALL) + b"POST /never\n" + HEAD.pack(0, 1, CANCEL))
                await asyncio.sleep(0.1)
                server.should_exit = True
                await asyncio.wait_for(asyncio.shield(task), 5)

    asyncio.run(run())
