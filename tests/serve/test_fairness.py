"""How much a tenant may ask for in a minute, and who goes next: buckets and flows, without a server."""

import asyncio

import pytest

from serve.fairness import FairQueue, Full
from serve.limiter import Buckets


def test_a_minutes_tokens_come_back_evenly_and_unused_ones_at_once() -> None:
    now = [0.0]
    buckets = Buckets(None, 60, clock=lambda: now[0])
    assert buckets.take(60) is None
    assert buckets.take(30) == ("tokens", 30.0)
    buckets.settle(taken=60, used=40)
    assert buckets.take(20) is None
    now[0] += 30
    assert buckets.take(31) == ("tokens", pytest.approx(1.0))
    assert buckets.take(30) is None
    now[0] -= 3600  # a clock that jumps back gives nothing and takes nothing
    assert Buckets(1, None, clock=lambda: now[0]).take(0) is None


def test_a_quiet_hour_saves_up_one_minutes_worth_and_a_large_request_borrows_from_the_next() -> None:
    now = [0.0]
    buckets = Buckets(None, 60, clock=lambda: now[0])
    now[0] += 3600
    assert buckets.take(60) is None
    assert buckets.take(1) == ("tokens", pytest.approx(1.0))
    now[0] += 60
    buckets.settle(taken=60, used=0)  # which comes late: the bucket is full again
    assert buckets.take(100) is None  # more than a minute's worth, which a full one gives
    assert buckets.take(1) == ("tokens", pytest.approx(41.0))


def test_what_is_refused_for_its_tokens_takes_no_request() -> None:
    buckets = Buckets(2, 10, clock=lambda: 0.0)
    assert buckets.take(10) is None
    for _ in range(3):
        assert buckets.take(5) == ("tokens", 30.0)
    assert buckets.take(0) is None


def test_waiting_flows_share_by_tokens_and_weight() -> None:
    async def served() -> list[str]:
        queue, order = FairQueue(places=1), list[str]()
        holder = await queue.enter("holder")

        async def one(name: str, cost: float, weight: float) -> None:
            flow = await queue.enter(name, cost=cost, weight=weight)
            order.append(name)
            await asyncio.sleep(0)
            queue.leave(flow)

        jobs = [asyncio.create_task(one("heavy", 100, 1)) for _ in range(40)]
        await asyncio.sleep(0)
        jobs += [asyncio.create_task(one("light", 10, 1)) for _ in range(40)]
        jobs += [asyncio.create_task(one("double", 10, 2)) for _ in range(40)]
        await asyncio.sleep(0)
        queue.leave(holder)
        await asyncio.gather(*jobs)
        assert not queue.running
        assert not queue.waiting
        return order

    first = asyncio.run(served())[:33]
    assert first.count("heavy") <= 3
    assert 9 <= first.count("light") <= 12
    assert 18 <= first.count("double") <= 22


def test_the_queue_is_bounded_and_a_cancelled_wait_frees_its_room() -> None:
    async def check() -> None:
        queue = FairQueue(places=1, room=3, flow_room=2)
        holder = await queue.enter("a")
        waiting = [asyncio.create_task(queue.enter(name)) for name in ("a", "a", "b")]
        await asyncio.sleep(0)
        for name, own in (("a", True), ("c", False)):
            with pytest.raises(Full) as caught:
                await queue.enter(name)
            assert caught.value.own is own
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert queue.waiting == 2
        queue.leave(holder)
        for done in asyncio.as_completed(waiting[1:]):
            queue.leave(await done)
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(check())


def test_who_leaves_as_its_turn_comes_gives_its_place_back() -> None:
    async def check() -> None:
        queue = FairQueue(places=1)
        holder = await queue.enter("a")
        turn = asyncio.create_task(queue.enter("b"))
        await asyncio.sleep(0)
        queue.leave(holder)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        async with asyncio.timeout(1):
            queue.leave(await queue.enter("c"))
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(check())


@pytest.mark.parametrize("at_once", [False, True])
def test_a_flow_does_not_owe_for_what_it_gave_up_waiting_for(at_once: bool) -> None:
    """Nor where a place becomes free in the turn in which it gives up."""

    async def served() -> list[str]:
        queue, order = FairQueue(places=1), list[str]()
        holder = await queue.enter("holder")

        async def one(name: str, cost: float) -> None:
            flow = await queue.enter(name, cost=cost)
            order.append(name)
            await asyncio.sleep(0)
            queue.leave(flow)

        gone = [asyncio.create_task(one("a", 1000)) for _ in range(10)]
        await asyncio.sleep(0)
        jobs = [asyncio.create_task(one("a", 1)), *(asyncio.create_task(one("b", 1)) for _ in range(50)), asyncio.create_task(one("a", 1))]
        await asyncio.sleep(0)
        for job in gone:
            job.cancel()
        if not at_once:
            await asyncio.sleep(0)
        queue.leave(holder)
        await asyncio.gather(*jobs)
        return order

    order = asyncio.run(served())
    assert order.count("a") == 2
    assert set(order[:4]) == {"a", "b"}
    assert order[:4].count("a") == 2
