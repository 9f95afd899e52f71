"""Which generation of which adapter is meant and served where: switching, leasing, draining. Knows no HTTP of clients.

A name points at one Resident. A new generation is loaded beside it and proven through the live engine; then the name moves in one
step, the old one drains and is unloaded. A refusal leaves what was serving untouched.
"""

import asyncio
import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager

from embedft.adapters.passport import read_passport
from embedft.adapters.probes import ProbeReport
from embedft.adapters.store import GENERATION, NAME, AdapterStore, check_name
from embedft.errors import AdapterInvalid, AdapterNotFound, EmbedftError, GenerationConflict, MethodUnsupported, ProbesFailed
from serve.engine import Engine
from serve.errors import NotReady
from serve.fitting import check_fit, checked, engine_for, home_of, state_of
from serve.loading import Loading
from serve.probing import probe
from serve.resident import Resident
from serve.sources import Found, find

BASE_NAMED = "a base has that name: choose another"
KEPT_EARLIER = 4  # earlier generations that stay loaded though no request asks for them


class _Superseded(Exception):
    """Another resident stands for what was asked."""


class Lifecycle:
    """All adapters over all engines. A name changes under that name's lock; the switch itself has no await in it."""

    def __init__(self, engines: Iterable[Engine], store: AdapterStore) -> None:
        self.engines = {engine.name: engine for engine in engines}
        self.store = store
        self.live: dict[str, Resident] = {}
        self.refused: dict[str, str] = {}
        self.loading = Loading()
        self._held: dict[str, Resident] = {}  # by engine id: live, draining, and earlier generations that were asked for
        self._names: dict[str, asyncio.Lock] = {}
        self._puts: Counter[str] = Counter()  # generations that are being put
        self._drains: set[asyncio.Task[None]] = set()
        self._populated: set[str] = set()

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncGenerator[Resident]:
        """The generation that `name` (or `name@hex`) means, loaded and kept so inside the block.

        Raises AdapterNotFound, AdapterUnavailable, SlotsPinned, NotReady.
        """
        async with AsyncExitStack() as stack:
            while True:
                resident = self.get(name)
                load, slots = functools.partial(self._reload, resident), self.loading.slots_of(resident.engine)
                held = slots.held(resident, load=load, unload=self.loading.evict)
                with contextlib.suppress(_Superseded):
                    await stack.enter_async_context(held)
                    break
            yield resident
        if resident.earlier:
            self._trim(resident.engine)

    def get(self, name: str) -> Resident:
        """What serves `name`, or with `name@hex` that generation, now or earlier, of a name that is served. AdapterNotFound."""
        plain, at, digits = name.partition("@")
        resident = self.live.get(plain)
        if resident and (not at or (len(digits) >= 12 and resident.generation.startswith(digits))):
            return resident
        if resident and at and (found := self._earlier(resident, digits)):
            return found
        raise AdapterNotFound(name[:80], list(self.live))

    def _earlier(self, live: Resident, digits: str) -> Resident | None:
        if not GENERATION.fullmatch(digits):
            return None
        with contextlib.suppress(EmbedftError, OSError):
            for identity in self.store.history(live.name):
                if identity.startswith(digits):
                    known = self._held.get(f"{live.name}@{identity[:12]}")
                    if known:
                        return known
                    folder = self.store.folder(identity)
                    passport = read_passport(folder, name=live.name)
                    engine = engine_for(live.name, passport, self.engines.values())  # the name may have come from another base
                    check_fit(live.name, passport, engine)
                    resident = Resident(live.name, identity, folder, passport, engine, earlier=True)
                    self._held[resident.id] = resident
                    self._trim(engine)
                    return resident
        return None

    def _trim(self, engine: Engine) -> None:
        """Of the earlier generations that nobody uses, only the last few stay."""
        unused = [held for held in self._held.values() if held.earlier and held.engine is engine and not held.leases]
        for resident in sorted(unused, key=lambda held: held.used or time.monotonic())[: -KEPT_EARLIER or None]:
            resident.earlier, resident.retired = False, True
            self._start_drain(resident)

    async def _reload(self, resident: Resident) -> None:
        """Into a slot again. Raises _Superseded where it drains, or has, since the request began to wait: another is meant now, or none."""
        if resident.retired or self._held.get(resident.id) is not resident:
            raise _Superseded
        await self.loading.again(resident)

    def holds(self, generation: str) -> bool:
        """Whether anything that is served or drains has its files there."""
        return any(resident.generation == generation for resident in self._held.values())

    def draining(self) -> list[Resident]:
        return [resident for resident in self._held.values() if resident.retired]

    def earlier(self) -> list[Resident]:
        """Generations that serve no name, kept for the requests that ask for them."""
        return [resident for resident in self._held.values() if resident.earlier]

    async def put(
        self,
        name: str,
        *,
        source: str | None = None,
        generation: str | None = None,
        pin: bool | None = None,
        expected: str | None = None,
        named: bool = True,
    ) -> Resident:
        """Load, prove and switch to the generation that `source` names; None or 'store' is the store's current one of that name.

        `generation` is what it must be, `expected` what must be serving. `pin` None: a pinned name stays pinned. `named` False: the store
        is not told, so the next server does not serve it.

        Raises AdapterNotFound, AdapterInvalid, BaseMismatch, ProbesFailed, GenerationConflict; then nothing has changed.
        """
        check_name(name)
        if name in self.engines:
            raise AdapterInvalid(name, BASE_NAMED)
        async with self._names.setdefault(name, asyncio.Lock()):
            current = self.live.get(name)
            if expected is not None and (current is None or not current.generation.startswith(expected) or len(expected) < 12):
                raise GenerationConflict(name, expected=expected, current=current.generation if current else None)
            pinned = bool(current and current.pinned) if pin is None else pin
            async with self._found(name, source) as found:
                if generation is not None and not found.generation.startswith(generation):
                    raise GenerationConflict(name, expected=generation, current=found.generation)
                return await self._serve(name, found, current, pin=pinned, named=named)

    @asynccontextmanager
    async def _found(self, name: str, source: str | None) -> AsyncGenerator[Found]:
        """What `source` means. A copy that was taken of it goes again where nothing came of it, and what it replaced is there again."""
        kept = ExitStack()
        try:
            found = await asyncio.to_thread(find, self.store, name, source, kept)
        except BaseException:
            await asyncio.to_thread(kept.__exit__, *sys.exc_info())
            raise
        self._puts[found.generation] += 1
        try:
            yield found
        except BaseException:
            await asyncio.shield(asyncio.to_thread(kept.__exit__, *sys.exc_info()))
            raise
        finally:
            await asyncio.to_thread(kept.close)
            self._puts -= Counter([found.generation])
            if found.copied and found.generation not in self._puts and not self.holds(found.generation):
                with contextlib.suppress(EmbedftError, OSError):  # then it stays until somebody tidies up
                    await asyncio.shield(asyncio.to_thread(self.store.discard, found.generation))

    async def _serve(self, name: str, found: Found, current: Resident | None, *, pin: bool, named: bool) -> Resident:
        """Prove `found`, point the store's name at it and switch from `current` to it."""
        if current and current.generation == found.generation and not current.retired:
            await self._renew(current, found)
            if pin:
                async with self.lease(name):  # one that was evicted comes back first, and stays
                    current.pinned = True
            current.pinned, resident = pin, current
        else:
            resident = await self._load(name, found, pin=pin)
        try:
            if named:
                await asyncio.to_thread(self.store.point, name, found.generation)
        except BaseException:
            if resident is not current:
                self._retire(resident)
            raise
        if resident is not current:
            self._switch(resident, current)
        return resident

    async def _renew(self, resident: Resident, found: Found) -> None:
        """What stands beside its weights may be new, as metrics and probes are that an import brought: read, and proven, again."""
        state = await asyncio.to_thread(state_of, found.folder)
        if resident.proven == state:
            return
        passport = await asyncio.to_thread(checked, resident.name, found)
        async with self.lease(resident.name):
            report = await probe(resident.engine, resident.id, found.folder)
        if not report.passed:
            raise ProbesFailed(resident.name, report.reason)
        resident.passport, resident.report, resident.proven = passport, report, state

    async def delete(self, name: str) -> Resident:
        """Stop serving `name`: it drains and is unloaded. The store keeps it. AdapterNotFound, for `name@hex` too."""
        if name not in self.live:
            raise AdapterNotFound(name[:80], list(self.live))
        async with self._names.setdefault(name, asyncio.Lock()):
            resident = self.live.pop(name, None)
            if resident is None:
                raise AdapterNotFound(name, list(self.live))
            self._retire(resident)
            return resident

    async def verify(self, name: str) -> tuple[Resident, ProbeReport]:
        """Replay the probes of what `name` or `name@hex` means now."""
        async with self.lease(name) as resident:
            resident.engine.supervisor.require_ready()
            resident.report = await probe(resident.engine, resident.id, resident.folder)
            return resident, resident.report

    async def populate(self, engine: Engine) -> None:
        """A fresh engine process: load what belongs in it. The first time that is the store's, later what was serving.

        With fewer slots than adapters: the pinned, those that requests wait with, the last used. Nothing makes room for another here,
        since a request that holds a slot may itself be waiting for the engine.
        """
        if engine.name not in self._populated:
            await self._from_store(engine)
            self._populated.add(engine.name)
            return
        slots = self.loading.slots_of(engine)
        slots.all_went()
        for resident in [held for held in self._held.values() if held.engine is engine and (held.retired or held.earlier)]:
            del self._held[resident.id]
        serving = [held for held in self.live.values() if held.engine is engine]
        for resident in sorted(serving, key=lambda held: (not held.pinned, not held.leases, -held.used)):
            try:
                async with engine.lock:
                    if slots.full:
                        return
                    if self.live.get(resident.name) is not resident or resident.loaded:  # replaced, or loaded, while this waited
                        continue
                    await asyncio.to_thread(checked, resident.name, Found(resident.generation, resident.folder))
                    await self.loading.install(resident)
                    slots.came(resident)
            except (AdapterInvalid, MethodUnsupported, ProbesFailed, OSError) as error:
                self.live.pop(resident.name, None)
                self._held.pop(resident.id, None)
                self.refused[resident.name] = str(error)

    async def _from_store(self, engine: Engine) -> None:
        for name in await asyncio.to_thread(self.store.names):
            if name in self.engines:
                self.refused[name] = BASE_NAMED
                continue
            for identity in reversed(await asyncio.to_thread(self.store.history, name)):
                try:
                    found = await asyncio.to_thread(find, self.store, name, identity, ExitStack())  # a generation is never copied
                    passport = read_passport(found.folder, name=name)
                    if home_of(passport, self.engines.values()) is engine and name not in self.live:
                        self.live[name] = await self._load(name, found, engine=engine)
                    break
                except NotReady:
                    raise
                except EmbedftError as error:  # then the generation before it serves, as it would had this one been PUT
                    self.refused.setdefault(name, str(error))

    def unserved(self) -> dict[str, str]:
        """Names in the store that are not served, each with the reason."""
        reasons = self.store.damaged()
        for name in self.store.names():
            if name not in self.live:
                reasons[name] = self.refused.get(name) or self._why_not(name)
        return reasons

    def why_unserved(self, name: str) -> str | None:
        """Why what the store has under `name` is not served. None where it is, and where the store has none of that name."""
        if name in self.live or not NAME.fullmatch(name):
            return None
        try:
            self.store.current(name)
        except AdapterNotFound:
            return None
        except (EmbedftError, OSError) as error:
            return str(error)
        return self.refused.get(name) or self._why_not(name)

    def _why_not(self, name: str) -> str:
        try:
            engine_for(name, self.store.passport(name), self.engines.values())
        except EmbedftError as error:
            return str(error)
        return "not loaded: PUT it to serve it"

    async def _load(self, name: str, found: Found, *, pin: bool = False, engine: Engine | None = None) -> Resident:
        """Check, load and prove; on refusal nothing of it stays in the engine."""
        passport = await asyncio.to_thread(checked, name, found)
        starting = engine is not None
        engine = engine or engine_for(name, passport, self.engines.values())
        if not starting:
            engine.supervisor.require_ready()
        check_fit(name, passport, engine)
        resident = Resident(name, found.generation, found.folder, passport, engine, pinned=pin)
        slots = self.loading.slots_of(engine)
        async with engine.lock:
            if not starting:
                engine.supervisor.require_ready()  # it may have died while this waited: then what belongs in it is loaded first
            held = self._held.get(resident.id)
            if held and held.loaded:  # draining, or asked for by its generation: take it back
                held.report = await probe(engine, held.id, held.folder)
                if not held.report.passed:
                    raise ProbesFailed(name, held.report.reason)
                held.passport, held.retired, held.earlier = passport, False, False
                held.pinned = pin
                return held
            await slots.make_room(self.loading.evict)
            await self.loading.install(resident)
            slots.came(resident)
            self._held[resident.id] = resident
        return resident

    def _switch(self, resident: Resident, current: Resident | None) -> None:
        self.live[resident.name] = resident
        self.refused.pop(resident.name, None)
        if current:
            self._retire(current)

    def _retire(self, resident: Resident) -> None:
        resident.retired = True
        self._start_drain(resident)

    def _start_drain(self, resident: Resident) -> None:
        task = asyncio.create_task(self._drain(resident), name=f"drain {resident.id}")
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)

    async def _drain(self, resident: Resident) -> None:
        while True:
            await resident.idle.wait()
            async with resident.engine.lock:
                if not resident.retired or self._held.get(resident.id) is not resident:
                    return
                if resident.leases:  # a request that names this generation came in while this waited for the lock
                    continue
                del self._held[resident.id]
                if resident.loaded:
                    self.loading.slots_of(resident.engine).went(resident)
                    with contextlib.suppress(EmbedftError):
                        await resident.engine.client.unload(resident.id)
                return
