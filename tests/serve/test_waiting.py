"""Waiting for a slot or for an engine ends: seats without an engine, and a supervisor over a process that does nothing."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from embedft.errors import EngineFailed
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


class Told:
    """Slots that tell what was loaded and unloaded. An unload waits for `gate`."""

    def __init__(self, size: int) -> None:
        self.slots, self.order = Slots(size, asyncio.Lock()), list[tuple[str, Seat]]()
        self.gate = asyncio.Event()
        self.gate.set()

    @asynccontextmanager
    async def held(self, seat: Seat) -> AsyncGenerator[None]:
        async def load() -> None:
            self.order.append(("load", seat))

        async def unload(victim: Seat) -> None:
            self.order.append(("unload", victim))
            await self.gate.wait()

        async with self.slots.held(seat, load=load, unload=unload):
            yield

    async def use(self, seat: Seat) -> None:
        async with self.held(seat):
            self.order.append(("use", seat))


def test_one_whose_requests_overlap_without_end_makes_room_all_the_same() -> None:
    async def check() -> None:
        told, busy, wanted = Told(1), Seat(), Seat()
        async with told.held(busy):
            waiting = [asyncio.create_task(told.use(wanted))]
            await asyncio.sleep(0.01)
            waiting.append(asyncio.create_task(told.use(busy)))
            await asyncio.sleep(0.01)
        await asyncio.wait_for(asyncio.gather(*waiting), 1)
        assert [seat for what, seat in told.order if what == "use"] == [wanted, busy]

    asyncio.run(check())


@pytest.mark.parametrize("count", [2, 3, 8])
def test_each_who_wants_the_only_slot_has_it_once_it_was_loaded(count: int) -> None:
    """Else two would take it from each other before either has used it, without end."""

    async def check() -> None:
        told, seats = Told(1), [Seat() for _ in range(count)]
        async with asyncio.timeout(5):
            await asyncio.gather(*(told.use(seat) for seat in seats))
        assert [seat for what, seat in told.order if what == "load"] == [seat for what, seat in told.order if what == "use"] == seats

    asyncio.run(check())


def test_who_leaves_as_its_seat_comes_gives_it_back() -> None:
    async def check() -> None:
        told, seat, other = Told(1), Seat(), Seat()
        opened = asyncio.Event()

        async def load() -> None:
            await opened.wait()

        async def unload(_: Seat) -> None:
            return

        async def use() -> None:
            async with told.slots.held(seat, load=load, unload=unload):
                pass

        for turns in range(8):
            opened.clear()
            waiting = [asyncio.create_task(use()) for _ in range(2)]
            await asyncio.sleep(0.01)
            opened.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert not waiting[1].cancelled()
            assert (seat.loaded, seat.leases, seat.idle.is_set()) == (True, 0, True)
            await asyncio.wait_for(told.use(other), 1)

    asyncio.run(check())


def test_all_who_wait_for_what_cannot_be_loaded_are_told_so_and_may_ask_again() -> None:
    async def check() -> None:
        slots, seat = Slots(1, asyncio.Lock()), Seat()

        async def damaged() -> None:
            raise ValueError("damaged")

        async def nothing(_: Seat | None = None) -> None:
            return

        async def use() -> None:
            async with slots.held(seat, load=damaged, unload=nothing):
                pass

        told = await asyncio.gather(*(use() for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in told] == ["damaged"] * 3
        async with asyncio.timeout(1), slots.held(seat, load=nothing, unload=nothing):
            assert seat.leases == 1

    asyncio.run(check())


def test_one_that_was_to_make_room_goes_on_where_another_made_it_first() -> None:
    async def check() -> None:
        told, chosen, other, wanted = Told(2), Seat(), Seat(), Seat()
        async with told.held(chosen):
            async with told.held(other):
                waiting = asyncio.create_task(told.use(wanted))
                await asyncio.sleep(0.01)
            await asyncio.wait_for(waiting, 1)
            async with told.slots._lock:  # pyright: ignore[reportPrivateUsage]  # as while others are loaded
                await asyncio.wait_for(told.use(chosen), 1)
        assert told.order.count(("load", chosen)) == 1

    asyncio.run(check())


def test_the_one_that_was_not_used_for_longest_makes_room() -> None:
    async def check() -> None:
        told, often, seldom, wanted = Told(2), Seat(), Seat(), Seat()
        for seat in (often, seldom, often, wanted):
            await told.use(seat)
        assert [seat for what, seat in told.order if what == "unload"] == [seldom]

    asyncio.run(check())


def test_no_request_takes_one_that_is_on_its_way_out() -> None:
    async def check() -> None:
        told, leaving, wanted = Told(1), Seat(), Seat()
        await told.use(leaving)
        told.gate.clear()
        waiting = [asyncio.create_task(told.use(wanted))]
        await asyncio.sleep(0.01)
        waiting.append(asyncio.create_task(told.use(leaving)))
        await asyncio.sleep(0.01)
        assert told.order[-1] == ("unload", leaving)
        told.gate.set()
        await asyncio.wait_for(asyncio.gather(*waiting), 1)
        assert told.order[-2:] == [("load", leaving), ("use", leaving)]

    asyncio.run(check())


def test_what_is_pinned_leaves_fewer_slots_for_those_of_one_request() -> None:
    slots, pinned, one, other = Slots(2, asyncio.Lock()), Seat(pinned=True), Seat(), Seat()
    assert slots.fit({one, other})
    slots.came(pinned)
    assert slots.fit({pinned, one})
    assert not slots.fit({one, other})


def supervisor(folder: Path, script: str, *, healthy: bool = True, start_seconds: float = 10) -> Supervisor:
    """Over a shell's `script`, with nothing to be prepared."""

    async def answers() -> bool:
        return healthy

    async def prepare() -> None:
        return

    command = Command(["sh", "-c", script], {"OWN": "its own"}, folder / "s", folder / "log")
    return Supervisor("x", command, healthy=answers, prepare=prepare, start_seconds=start_seconds, stop_seconds=1)


def test_an_engine_that_never_answers_is_given_up(tmp_path: Path) -> None:
    async def check() -> None:
        engine = supervisor(tmp_path, "echo loading; sleep 60", healthy=False, start_seconds=0.5)
        async with asyncio.timeout(10):
            with pytest.raises(EngineFailed, match=r"(?s)did not answer in.*loading"):
                await engine.start()
        assert engine.state == "stopped"
        began = time.monotonic()
        assert not await engine.back(began + 5)
        assert time.monotonic() - began < 1  # nobody waits for what was stopped

    asyncio.run(check())


def test_an_engine_has_not_the_admins_token_and_its_log_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDFT_ADMIN_TOKEN", "secret")
    monkeypatch.setattr("serve.supervisor.LOG_BYTES", 100)

    async def check() -> None:
        log = tmp_path / "log"
        for left, kept in (("x" * 100, True), ("x" * 101, False)):
            log.write_text(left)
            engine = supervisor(tmp_path, "env; echo told; sleep 60")
            await engine.start()
            async with asyncio.timeout(10):
                while "told" not in log.read_text():
                    await asyncio.sleep(0.01)
            await engine.stop()
            assert "OWN=its own" in log.read_text()
            assert "secret" not in log.read_text()
            assert log.read_text().startswith(left) is kept

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
