"""Work that nobody waits for any more is given up. Of the gateway and of the engines."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody is there to be answered."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """`work`, cancelled as soon as the client hangs up. The body must have been read. Raises ClientGone.

    It runs in the task that awaits it, as under asyncio.timeout: a task of its own would answer two turns of the loop later.
    """
    task, here, left = asyncio.current_task(), True, False
    assert task is not None

    def leave(_: object) -> None:
        nonlocal left
        if here:  # a callback that is under way cannot be taken back
            left = True
            task.cancel()

    gone = asyncio.ensure_future(_hung_up(request))
    gone.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if left and task.cancelling() == 1:  # by nobody else
            raise ClientGone from None
        raise
    finally:
        here = False
        gone.cancel()
        if left:
            task.uncancel()


async def together(calls: Sequence[Any]) -> list[Any]:
    """Await all; at the first failure cancel the rest and raise it."""
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
