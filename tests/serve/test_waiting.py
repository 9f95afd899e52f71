"""Waiting for a slot or for an engine ends: seats without an engine, and a supervisor over a process that does nothing."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from serve.slots import Seat, Slots
from serve.supervisor import Command, Supervisor


def test_who_waits_for_room_has_it_when_the_engine_is_another() -> None:
    """The lease that fills the only slot is itself waiting for the engine, which is ready only once who waits lets go of its lock."""

    async def check() -> None:
        lock = asyncio.Lock()
        slots = Slots(1, lock)
        first, second = Seat(), Seat()

        async def nothing(_: Seat | None = None) -> None:
            return None

        async with slots.held(first, load=nothing, unload=nothing):
            waiting = asyncio.create_task(slots.held(second, load=nothing, unload=nothing).__aenter__())
            await asyncio.sleep(0.01)
            assert lock.locked()
            slots.all_went()
            await asyncio.wait_for(waiting, 1)
        assert not lock.locked()

    asyncio.run(check())


def test_requests_for_what_is_loaded_do_not_wait_for_what_is_being_loaded() -> None:
    async def check() -> None:
        slots, opened = Slots(2, asyncio.Lock()), asyncio.Event()
        here, coming = Seat(), Seat()

        async def nothing(_: Seat | None = None) -> None:
            return None

        async def slow() -> None:
            await opened.wait()

        async with slots.held(here, load=nothing, unload=nothing):
            pass
        waiting = asyncio.create_task(slots.held(coming, load=slow, unload=nothing).__aenter__())
        await asyncio.sleep(0.01)
        for _ in range(3):
            async with asyncio.timeout(1), slots.held(here, load=nothing, unload=nothing):
                assert not waiting.done()
        opened.set()
        await asyncio.wait_for(waiting, 1)

    asyncio.run(check())


def test_an_engine_comes_back_once_what_kept_it_from_starting_has_passed(tmp_path: Path) -> None:
    calls: list[int] = []

    async def healthy() -> bool:
        return True

    async def prepare() -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            raise OSError(24, "Too many open files")

    async def check() -> None:
        command = Command([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "s", tmp_path / "log")
        supervisor = Supervisor("x", command, healthy=healthy, prepare=prepare, start_seconds=10, stop_seconds=1)
        await supervisor.start()
        process = supervisor._process  # pyright: ignore[reportPrivateUsage]
        assert process
        os.kill(process.pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            while len(calls) < 3 or supervisor.state != "ready":
                await asyncio.sleep(0.02)
        assert supervisor.last_failure == "[Errno 24] Too many open files"
        await supervisor.stop()

    asyncio.run(check())
