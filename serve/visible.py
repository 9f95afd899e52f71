"""What one tenant sees of the bases and adapters: an adapter that is not its own cannot be told from one that does not exist."""

import asyncio
from collections.abc import AsyncGenerator, Sequence, Set
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import cached_property

from fastapi import Request

from embedft.errors import AdapterNotFound, InputInvalid
from serve.access import Record
from serve.admission import Budget, Ticket
from serve.aliases import Table, pick
from serve.engine import Engine
from serve.errors import QueueFull
from serve.gateway import Gateway
from serve.resident import Resident
from serve.schemas import Mix
from serve.tenants import Tenant

STICKY = "x-embedft-sticky"  # a header: requests with one value of it get one variant of an alias
Named = str | list[str | None] | None


class Visible:
    """One request's view. Every name that a client sends is looked up here and nowhere else. `key` is what an alias sticks to."""

    def __init__(self, gateway: Gateway, tenant: Tenant, record: Record, *, key: str | None) -> None:
        self.gateway, self.tenant, self.record = gateway, tenant, record
        self._lifecycle = gateway.lifecycle
        self._key, self._mixed = key, set[str]()
        self._picked: dict[str, str] = {}
        self._engines: dict[str, Engine] | None = None

    @property
    def engines(self) -> dict[str, Engine]:
        if self._engines is None:
            self._engines = {name: engine for name, engine in self._lifecycle.engines.items() if self.tenant.may_ask(name)}
        return self._engines

    @property
    def live(self) -> dict[str, Resident]:
        return {name: resident for name, resident in self._lifecycle.live.items() if self.may_use(name)}

    @property
    def aliases(self) -> dict[str, dict[str, int]]:
        return {name: variants for name, variants in self._aliases.items() if self.may_use(name)}

    @cached_property
    def _aliases(self) -> Table:
        """Looked up once a request, which would otherwise see a change in its midst."""
        return self.gateway.aliases.all

    def may_use(self, name: str) -> bool:
        """A mix belongs to the tenant that asked for it, whatever the patterns say."""
        if self.gateway.mixes.is_mix(name):
            return self.gateway.mixes.owned(name, self.tenant.name) or (self.tenant.admin and self.gateway.tenants.keyed)
        return self.tenant.may_use(name)

    def knows(self, model: str) -> bool:
        """Whether `model` names an adapter or an alias."""
        plain = model.partition("@")[0]
        return self.may_use(plain) and (plain in self._lifecycle.live or model in self._aliases)

    def get(self, name: str) -> Resident:
        """The generation that `name` means. AdapterNotFound, in the same words whether it is unknown or another's."""
        try:
            if self.may_use(name.partition("@")[0]):
                return self._lifecycle.get(self._meant(name))
        except AdapterNotFound:
            pass
        raise self._unknown(name)

    def _unknown(self, name: str) -> AdapterNotFound:
        meant = self._picked.get(name, name)
        return AdapterNotFound(meant[:80], [*self.live, *self.aliases], unserved=self.why_unserved(meant))

    def why_unserved(self, name: str) -> str | None:
        """Why an adapter of the store that this tenant may use is not served; None for what it may not, or is not there."""
        plain = name.partition("@")[0]
        return self._lifecycle.why_unserved(plain) if self.may_use(plain) else None

    def _meant(self, name: str) -> str:
        """An alias' variant: drawn once a request."""
        if name in self._aliases and name not in self._picked:
            self._picked[name] = pick(name, self._aliases[name], self._key and f"{self.tenant.name}/{self._key}")
            self.record.tell(alias=name)
        return self._picked.get(name, name)

    async def named(self, adapter: Named | Mix) -> Named:
        """A mix made and proven, by the name it then has; anything else as it is. AdapterNotFound, InputInvalid, RateLimited."""
        if not isinstance(adapter, Mix):
            return adapter
        members = [(self.get(member.adapter), float(member.weight)) for member in adapter.mix]
        return await self.gateway.mixes.name_of(members, self.tenant.name)

    def counted(self, resident: Resident | None) -> str | None:
        """Under which name metrics count it: an earlier generation apart from the one that serves."""
        return None if resident is None else resident.id if resident.earlier else resident.counted

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncGenerator[Resident]:
        """The generation that `name` means, kept loaded inside the block. AdapterNotFound, QueueFull where no slot came free in time."""
        self.get(name)
        seconds = self.gateway.config.limits.queue_seconds
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(seconds):
                    resident = await stack.enter_async_context(self._lifecycle.lease(self._meant(name)))
            except TimeoutError:
                raise QueueFull(f"adapter {name!r} had no slot within {seconds:.0f} s") from None
            except AdapterNotFound:  # deleted while this waited: told in this tenant's own words
                raise self._unknown(name) from None
            yield resident

    @asynccontextmanager
    async def leases(self, names: Sequence[str]) -> AsyncGenerator[dict[str, Resident]]:
        """Several of one base, all kept loaded inside the block. As `lease`, and InputInvalid where they can never be loaded at once."""
        async with AsyncExitStack() as stack:
            async with self._turn({self.get(name) for name in names}):
                taken = {name: await stack.enter_async_context(self.lease(name)) for name in names}
            yield taken

    @asynccontextmanager
    async def _turn(self, wanted: Set[Resident]) -> AsyncGenerator[None]:
        """Of requests that take several slots of an engine, one at a time does."""
        if len(wanted) < 2:
            yield
            return
        engine, seconds = next(iter(wanted)).engine, self.gateway.config.limits.queue_seconds
        slots = self._lifecycle.loading.slots_of(engine)
        if not slots.fit(wanted):
            said = f"{len(wanted)} adapters in one request, and base {engine.name!r} has {slots.size} slots for them and what is pinned"
            raise InputInvalid("too_many_adapters", f"{said}: ask for fewer at a time", "adapter")
        try:
            async with asyncio.timeout(seconds):
                await slots.together.acquire()
        except TimeoutError:
            raise QueueFull(f"base {engine.name!r} had no slots for {len(wanted)} adapters within {seconds:.0f} s") from None
        try:
            yield
        finally:
            slots.together.release()

    def limited(self, cost: int) -> AbstractAsyncContextManager[Budget]:
        """One request inside the block, within its tenant's limits. RateLimited."""
        return self.gateway.admission.limited(self.tenant, cost)

    def placed(self, budget: Budget, engine: Engine, adapter: str | None, *, route: str, cost: int) -> AbstractAsyncContextManager[Ticket]:
        """A place at `engine` inside the block. RateLimited, QueueFull."""
        return self.gateway.admission.placed(budget, engine, adapter, route=route, cost=cost, record=self.record)

    @asynccontextmanager
    async def admitted(self, engine: Engine, adapter: str | None, *, route: str, cost: int) -> AsyncGenerator[Ticket]:
        """Both, for a request that asks one engine once."""
        async with self.limited(cost) as budget, self.placed(budget, engine, adapter, route=route, cost=cost) as ticket:
            yield ticket


def visible(gateway: Gateway, request: Request) -> Visible:
    """The view of who sent `request`."""
    return Visible(gateway, request.state.tenant, request.state.record, key=request.headers.get(STICKY))
