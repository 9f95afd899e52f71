"""How many adapters one engine holds at a time: loaded when asked for, the least recently used makes room, never one in use.

Requests for loaded adapters never wait here. When every slot is in use, the least recently used takes no new request until it is
idle, so nothing starves: its own later requests wait their turn like the others'. Knows no names' meaning and no HTTP.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from embedft.errors import EngineBusy

Load = Callable[[], Awaitable[None]]


@dataclass(eq=False)
class Seat:
    """What may hold a slot. `leases` counts the requests that use it now; `idle` is set while there is none."""

    pinned: bool = field(default=False, kw_only=True)
    loaded: bool = field(default=False, kw_only=True)
    leaving: bool = field(default=False, kw_only=True)
    leases: int = field(default=0, kw_only=True)
    used: float = field(default=0.0, kw_only=True)
    idle: asyncio.Event = field(default_factory=asyncio.Event, kw_only=True)

    def __post_init__(self) -> None:
        self.idle.set()


Unload = Callable[[Seat], Awaitable[None]]


class SlotsPinned(EngineBusy):
    code = "slots_pinned"


class Slots:
    """One engine's. `size` None: no limit. `lock` is the engine's: one adapter comes or goes at a time, in the order asked for."""

    def __init__(self, size: int | None, lock: asyncio.Lock) -> None:
        self.size, self._lock = size, lock
        self.together = asyncio.Lock()  # for a request that takes several: two of them could each wait for what the other has
        self.loaded: set[Seat] = set()
        self._waiting: dict[Seat, list[asyncio.Future[None]]] = {}
        self._bringing: set[asyncio.Task[None]] = set()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def held(self, seat: Seat, *, load: Load, unload: Unload) -> AsyncGenerator[None]:
        """`seat` loaded and kept so inside the block. Raises what `load` raises, SlotsPinned."""
        if seat.loaded and not seat.leaving:
            self._lease(seat)
        else:
            await self._brought(seat, load, unload)
        try:
            yield
        finally:
            self._release(seat)

    def _lease(self, seat: Seat) -> None:
        seat.leases += 1
        seat.used = time.monotonic()
        seat.idle.clear()

    def _release(self, seat: Seat) -> None:
        seat.leases -= 1
        if not seat.leases:
            seat.idle.set()
            self._freed.set()

    async def _brought(self, seat: Seat, load: Load, unload: Unload) -> None:
        """All who wait for one seat wait for one task, which goes on though any of them leaves, and leases it to each of them."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if seat not in self._waiting:
            self._waiting[seat] = []
            task = asyncio.create_task(self._bring(seat, load, unload))
            self._bringing.add(task)
            task.add_done_callback(self._bringing.discard)
        self._waiting[seat].append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._release(seat)
            raise

    async def _bring(self, seat: Seat, load: Load, unload: Unload) -> None:
        try:
            async with self._lock:
                if not seat.loaded:
                    await self.make_room(unload)
                    await load()
                    self.came(seat)
                self._tell(seat, None)  # before the lock is let go of: who has it next could take the seat away unused
        except Exception as error:
            self._tell(seat, error)

    def _tell(self, seat: Seat, failure: Exception | None) -> None:
        for waiter in self._waiting.pop(seat):
            if waiter.done():  # nobody waits any more
                continue
            if failure is None:
                self._lease(seat)
                waiter.set_result(None)
            else:
                waiter.set_exception(failure)

    def came(self, seat: Seat) -> None:
        seat.loaded, seat.leaving, seat.used = True, False, time.monotonic()
        self.loaded.add(seat)

    def went(self, seat: Seat) -> None:
        seat.loaded = seat.leaving = False
        self.loaded.discard(seat)

    def all_went(self) -> None:
        """The engine's process is another: it holds nothing. Who waits for room has it, and sees that the engine is not ready yet."""
        for seat in list(self.loaded):
            self.went(seat)
        self._freed.set()

    def fit(self, seats: Set[Seat]) -> bool:
        """Whether all of `seats` could be loaded at once, beside the pinned others."""
        others = sum(seat.pinned for seat in self.loaded - seats)
        return self.size is None or len(seats) + others <= self.size

    @property
    def full(self) -> bool:
        return self.size is not None and len(self.loaded) >= self.size

    async def make_room(self, unload: Unload) -> None:
        """Evict until one slot is free. The engine's lock must be held. SlotsPinned where only pinned ones are there."""
        chosen: Seat | None = None
        try:
            while self.full:
                loose = [seat for seat in self.loaded if not seat.pinned]
                if not loose:
                    raise SlotsPinned(f"all {self.size} slots hold pinned adapters: unpin one, or raise `slots` of the base")
                idle = [seat for seat in loose if not seat.leases]
                if not idle:
                    chosen = chosen or min(loose, key=lambda seat: seat.used)
                    chosen.leaving = True
                    self._freed.clear()
                    await self._freed.wait()
                    continue
                victim = min(idle, key=lambda seat: seat.used)
                self.went(victim)  # before it goes, so that no request takes it on the way out
                await unload(victim)
        finally:
            if chosen:
                chosen.leaving = False
