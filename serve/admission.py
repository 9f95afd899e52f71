"""Every request's way to an engine: its tenant's limits, then a fair place in that engine's queue; counted and logged on the way out."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serve.access import Record
from serve.config import Limits
from serve.engine import Engine
from serve.errors import QueueFull, RateLimited
from serve.fairness import FairQueue, Flow, Full
from serve.metrics import Meters, Outcome
from serve.tenants import Tenant

CHARACTERS_A_TOKEN = 4  # only to guess a request's size before any tokenizer has seen it


@dataclass
class Budget:
    """What one request has used so far, over all the engines that it asked. `placed`: one has been asked at all."""

    tenant: Tenant
    used: int = 0
    placed: bool = False


@dataclass
class Ticket:
    """A place at an engine. `waited` in seconds."""

    engine: Engine
    adapter: str | None
    meters: Meters
    budget: Budget
    outcome: Outcome = field(default_factory=Outcome)
    used: int = 0
    waited: float = 0.0

    def count(self, usage: object) -> None:
        """Add an answer's `usage`."""
        self.meters.count_tokens(self.engine.name, self.adapter, usage)
        if isinstance(usage, dict):
            amounts = [usage.get(kind) for kind in ("prompt_tokens", "completion_tokens")]
            self.used += sum(amount for amount in amounts if isinstance(amount, int))
            self.budget.used += sum(amount for amount in amounts if isinstance(amount, int))


class Admission:
    """One queue an engine. `shared` False (no keys): each adapter is a flow of its own, and one may hold every place."""

    def __init__(self, limits: Limits, meters: Meters, *, shared: bool) -> None:
        self._limits, self._meters, self._shared = limits, meters, shared
        self._queues: dict[str, FairQueue] = {}
        self._running = 0

    def queue_of(self, engine: Engine) -> FairQueue:
        if engine.name not in self._queues:
            places = engine.config.places
            most = max(1, places - max(1, places // 4)) if self._shared else places  # a quarter stays free for the others
            limits = self._limits
            self._queues[engine.name] = FairQueue(places=places, most=most, room=limits.queue, flow_room=limits.tenant_queue)
        return self._queues[engine.name]

    @asynccontextmanager
    async def limited(self, tenant: Tenant, cost: int) -> AsyncGenerator[Budget]:
        """One request of `tenant` inside the block. `cost` is the most tokens it may use, guessed. Raises RateLimited."""
        self._check(tenant, cost)
        tenant.running += 1
        self._running += 1
        budget = Budget(tenant)
        try:
            yield budget
        finally:
            tenant.running -= 1
            self._running -= 1
            tenant.buckets.settle(taken=cost, used=budget.used or (cost if budget.placed else 0))

    @asynccontextmanager
    async def placed(
        self, budget: Budget, engine: Engine, adapter: str | None, *, route: str, cost: int, record: Record
    ) -> AsyncGenerator[Ticket]:
        """A place at `engine` inside the block; counted under `adapter`, and told to `record`. Raises RateLimited, QueueFull, NotReady."""
        record.tell(base=engine.name, adapter=adapter)
        engine.supervisor.require_ready()  # those that wait for it to come back were asking it when it died: no others join them
        ticket, began = Ticket(engine, adapter, self._meters, budget), time.perf_counter()
        flow = await self._place(budget.tenant, engine, adapter, cost)
        budget.placed, ticket.waited = True, time.perf_counter() - began
        self._meters.queued.labels(engine.name, adapter or "").observe(ticket.waited)
        record.tell(queued_ms=round(ticket.waited * 1000, 1))
        try:
            with self._meters.measured(engine.name, adapter, route, ticket.outcome, began=began):
                yield ticket
        finally:
            ended = None if ticket.outcome.status == "ok" else ticket.outcome.status
            record.tell(tokens=budget.used, ended=ended)  # a stream has said 200 by then
            self.queue_of(engine).leave(flow, spare=cost - ticket.used if ticket.used else 0)

    def _check(self, tenant: Tenant, cost: int) -> None:
        if self._running >= self._limits.requests:
            raise QueueFull(f"{self._running} requests are under way: come back shortly")
        most = tenant.limits.concurrency
        if most is not None and tenant.running >= most:
            raise RateLimited("concurrency", f"{tenant.running} of your requests are running: at most {most} at once", 1.0)
        short = tenant.buckets.take(cost)
        if short:
            what, wait = short
            raise RateLimited(what, f"your {what} of this minute are used up: come back in {wait:.0f} s", wait)

    async def _place(self, tenant: Tenant, engine: Engine, adapter: str | None, cost: int) -> Flow:
        name, waiting = tenant.name if self._shared else adapter or "", self.queue_of(engine)
        if (flow := waiting.enter_now(name, weight=tenant.weight, cost=cost)) is not None:
            return flow
        try:
            async with asyncio.timeout(self._limits.queue_seconds):
                return await waiting.enter(name, weight=tenant.weight, cost=cost)
        except Full as full:
            if full.own and self._shared:
                raise RateLimited("queue", "too many of your requests are waiting: let some finish", 2.0) from None
            raise QueueFull(f"base {engine.name!r} has too many requests waiting: come back shortly") from None
        except TimeoutError:
            raise QueueFull(f"base {engine.name!r} had no place within {self._limits.queue_seconds:.0f} s") from None


def guessed(characters: int, answer: int = 0) -> int:
    """Tokens of so many characters and of an answer of at most `answer` tokens."""
    return characters // CHARACTERS_A_TOKEN + answer + 1
