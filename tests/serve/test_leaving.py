"""Work is given up when its client hangs up, and only then."""

import asyncio
import contextlib
from typing import Any

import pytest

from serve.leaving import ClientGone, together, unless_gone


class Client:
    """Stands for a request: hangs up when `leaves` is set."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


def test_work_ends_with_its_client() -> None:
    async def run() -> None:
        client, ended = Client(), list[str]()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("work")

        asyncio.get_running_loop().call_later(0.01, client.leaves.set)
        with pytest.raises(ClientGone):
            await unless_gone(client, work())  # pyright: ignore[reportArgumentType]
        assert ended == ["work"]
        await asyncio.sleep(0.01)  # the task that awaited it goes on

    asyncio.run(run())


@pytest.mark.parametrize("turns", range(6))
def test_a_client_that_leaves_as_the_work_ends_ends_nothing_else(turns: int) -> None:
    """Whichever of the two comes first in that turn of the loop."""

    async def run() -> None:
        client = Client()

        async def work() -> str:
            for _ in range(turns):
                await asyncio.sleep(0)
            await client.leaves.wait()
            return "done"

        asyncio.get_running_loop().call_later(0.01, client.leaves.set)
        with contextlib.suppress(ClientGone):
            assert await unless_gone(client, work()) == "done"  # pyright: ignore[reportArgumentType]
        for _ in range(5):
            await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(run())


def test_who_cancels_the_whole_as_the_client_leaves_has_it_cancelled() -> None:
    """A server that ends must not be told that it was the client."""

    async def run() -> None:
        for turns in range(8):
            client = Client()
            whole = asyncio.ensure_future(unless_gone(client, asyncio.sleep(60)))  # pyright: ignore[reportArgumentType]
            await asyncio.sleep(0.01)
            client.leaves.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            if whole.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await whole
            else:
                assert isinstance(whole.exception(), ClientGone)

    asyncio.run(run())


def test_what_is_done_together_ends_with_its_first_failure() -> None:
    async def run() -> None:
        ended = list[str]()

        async def long() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("long")

        async def failing() -> None:
            await asyncio.sleep(0.01)
            raise ValueError("planted")

        with pytest.raises(ValueError, match="planted"):
            await together([long(), failing(), long()])
        await asyncio.sleep(0)
        assert ended == ["long", "long"]

    asyncio.run(run())


def test_who_cancels_the_whole_cancels_the_work() -> None:
    async def run() -> None:
        client = Client()
        whole = asyncio.ensure_future(unless_gone(client, asyncio.sleep(60)))  # pyright: ignore[reportArgumentType]
        await asyncio.sleep(0)
        whole.cancel()
        with pytest.raises(asyncio.CancelledError):
            await whole
        with pytest.raises(ValueError, match="planted"):
            await unless_gone(client, failing())  # pyright: ignore[reportArgumentType]

    async def failing() -> None:
        raise ValueError("planted")

    asyncio.run(run())
