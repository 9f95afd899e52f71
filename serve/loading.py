"""Adapters into the slots of engines and out of them: loaded, proven through the live engine, counted. Knows no names."""

import asyncio
import contextlib

from embedft.errors import EmbedftError, ProbesFailed
from serve.engine import Engine
from serve.errors import AdapterUnavailable, NotReady
from serve.fitting import check_fit, checked, state_of
from serve.probing import probe
from serve.resident import Resident
from serve.slots import Seat, Slots
from serve.sources import Found


class Loading:
    """`loads` by what metrics call an adapter and by outcome, `evictions` by the former."""

    def __init__(self) -> None:
        self.loads: dict[tuple[str, str], int] = {}
        self.evictions: dict[str, int] = {}
        self._slots: dict[str, Slots] = {}

    def slots_of(self, engine: Engine) -> Slots:
        if engine.name not in self._slots:
            self._slots[engine.name] = Slots(engine.config.slots, engine.lock)
        return self._slots[engine.name]

    async def evict(self, seat: Seat) -> None:
        assert isinstance(seat, Resident)
        self.evictions[seat.counted] = self.evictions.get(seat.counted, 0) + 1
        with contextlib.suppress(EmbedftError):
            await seat.engine.client.unload(seat.id)

    async def again(self, resident: Resident) -> None:
        """Into a slot of the running engine. Probed unless it was before and its files are the same. The engine's lock is held.

        Raises AdapterUnavailable, NotReady.
        """
        resident.engine.supervisor.require_ready()
        try:
            if resident.proven is not None and resident.proven == state_of(resident.folder):
                await resident.engine.client.load(resident.id, resident.folder)
                self._count(resident, "loaded")
                return
            await asyncio.to_thread(checked, resident.name, Found(resident.generation, resident.folder))
            check_fit(resident.name, resident.passport, resident.engine)
            await self.install(resident)
        except NotReady:
            raise
        except (EmbedftError, OSError) as error:
            raise AdapterUnavailable(f"{resident.id} cannot be loaded again: {error}") from error

    async def install(self, resident: Resident) -> None:
        """Load and prove; on refusal nothing of it stays in the engine, whose lock is held."""
        client, outcome = resident.engine.client, "refused"
        try:
            await client.load(resident.id, resident.folder)
            resident.report = await probe(resident.engine, resident.id, resident.folder)
            if not resident.report.passed:
                raise ProbesFailed(resident.name, resident.report.reason)
            resident.proven = state_of(resident.folder)
            outcome = "loaded"
        except BaseException:
            with contextlib.suppress(EmbedftError):
                await asyncio.shield(client.unload(resident.id))
            raise
        finally:
            self._count(resident, outcome)

    def _count(self, resident: Resident, outcome: str) -> None:
        key = (resident.counted, outcome)
        self.loads[key] = self.loads.get(key, 0) + 1
