"""What stands between a request and an engine: how many there may be, whose tokens pay for it, and who waits how long. No engine runs."""

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest

from serve.access import Record
from serve.admission import Admission, Budget
from serve.config import Limits
from serve.errors import QueueFull, RateLimited
from serve.limiter import Buckets
from serve.metrics import Meters
from serve.tenants import Tenant


def admission(*, shared: bool, **limits: Any) -> Admission:
    return Admission(Limits(**limits), Meters(cast("Any", None)), shared=shared)


def engine(places: int) -> Any:
    return SimpleNamespace(name="words", config=SimpleNamespace(places=places), supervisor=SimpleNamespace(require_ready=lambda: None))


def placed(door: Admission, tenant: Tenant, asked: Any, *, adapter: str | None = None, cost: int = 1, budget: Budget | None = None) -> Any:
    return door.placed(budget or Budget(tenant), asked, adapter, route="chat", cost=cost, record=Record("one"))


def test_of_all_tenants_together_only_so_many_requests_are_under_way() -> None:
    async def check() -> None:
        door = admission(shared=True, requests=2)
        async with door.limited(Tenant("anna"), 1), door.limited(Tenant("bert"), 1):
            with pytest.raises(QueueFull):
                await door.limited(Tenant("third"), 1).__aenter__()
        async with door.limited(Tenant("third"), 1):
            pass

    asyncio.run(check())


def test_a_request_whose_use_nobody_learnt_is_paid_for_as_it_was_guessed() -> None:
    """As of a client who hangs up before its stream has ended: else it would generate for nothing."""

    async def check() -> None:
        door, tenant = admission(shared=True), Tenant("anna", buckets=Buckets(None, 100))
        async with door.limited(tenant, 60):
            pass  # which no engine saw
        async with door.limited(tenant, 60) as budget, placed(door, tenant, engine(1), cost=60, budget=budget):
            pass
        with pytest.raises(RateLimited, match="tokens"):
            await door.limited(tenant, 60).__aenter__()
        other = Tenant("bert", buckets=Buckets(None, 100))
        async with (
            door.limited(other, 60) as budget,
            placed(door, other, engine(1), cost=60, budget=budget) as ticket,
        ):
            ticket.count({"prompt_tokens": 5, "completion_tokens": 5})
        async with door.limited(other, 60):
            pass

    asyncio.run(check())


def test_what_a_request_did_not_use_is_no_debt_of_its_flow() -> None:
    async def check() -> list[str]:
        door, asked, order = admission(shared=False), engine(2), list[str]()

        async def one(name: str) -> None:
            async with placed(door, Tenant("local"), asked, adapter=name):
                order.append(name)

        async with placed(door, Tenant("local"), asked, adapter="long", cost=1000), AsyncExitStack() as stack:
            async with placed(door, Tenant("local"), asked, adapter="frugal", cost=100) as ticket:
                ticket.count({"completion_tokens": 1})
            await stack.enter_async_context(placed(door, Tenant("local"), asked, adapter="spender", cost=50))
            waiting = [asyncio.create_task(one("spender")), asyncio.create_task(one("frugal"))]
            await asyncio.sleep(0)
            await stack.aclose()
            await asyncio.gather(*waiting)
        return order

    assert asyncio.run(check()) == ["frugal", "spender"]


def test_a_quarter_of_an_engines_places_stays_free_for_other_tenants() -> None:
    async def check() -> None:
        for shared, most in ((True, 3), (False, 4)):
            door, asked = admission(shared=shared, queue_seconds=0.05), engine(4)
            async with AsyncExitStack() as stack:
                for _ in range(most):
                    await stack.enter_async_context(placed(door, Tenant("flood"), asked))
                with pytest.raises(QueueFull):
                    await placed(door, Tenant("flood"), asked).__aenter__()
                if shared:
                    async with placed(door, Tenant("anna"), asked):
                        pass
        async with placed(admission(shared=True), Tenant("anna"), engine(1)):
            pass  # one place is nobody's quarter

    asyncio.run(check())


def test_nobody_waits_for_a_place_longer_than_is_allowed() -> None:
    async def check() -> None:
        door, asked = admission(shared=True, queue_seconds=0.1), engine(1)
        async with asyncio.timeout(5), placed(door, Tenant("anna"), asked):
            with pytest.raises(QueueFull, match="no place within"):
                await placed(door, Tenant("bert"), asked).__aenter__()
        async with placed(door, Tenant("bert"), asked):
            pass

    asyncio.run(check())


def test_a_full_queue_is_the_tenants_own_fault_only_where_there_are_tenants() -> None:
    async def check() -> None:
        for shared, error in ((True, RateLimited), (False, QueueFull)):
            door, asked = admission(shared=shared, tenant_queue=1, queue=9, queue_seconds=5), engine(1)
            async with placed(door, Tenant("anna"), asked):
                waiting = asyncio.create_task(placed(door, Tenant("anna"), asked).__aenter__())
                await asyncio.sleep(0)
                with pytest.raises(error) as told:
                    await placed(door, Tenant("anna"), asked).__aenter__()
                assert told.value.code == ("queue_limit_exceeded" if shared else "queue_full")
                waiting.cancel()

    asyncio.run(check())
