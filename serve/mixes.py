"""Weighted mixes: several adapters' effects added up into one exact adapter, made once, proven, and kept for a while. Knows no HTTP.

Each tenant has mixes of its own, under names that nobody can ask for otherwise.
"""

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embedft.adapters.store import AdapterStore
from embedft.errors import AdapterNotFound, EmbedftError, EngineBusy, InputInvalid
from serve.errors import RateLimited
from serve.lifecycle import Lifecycle
from serve.prover import Prover
from serve.resident import MIX, Resident

MAX_MEMBERS = 4
FAILED_SECONDS = 60.0  # until one that could not be made is tried again
LEAST_SECONDS, DRAINING_SECONDS = 0.1, 1.0  # between two looks at what has expired; at what has, and is still being used
_ALIKE = ("task", "side", "prompts", "pooling", "normalize", "max_length", "template_hash")


@dataclass
class Kept:
    tenant: str
    used: float
    error: EmbedftError | None = None  # why it could not be made: not tried again at once, and counted as one


class Mixes:
    """`quota` mixes a tenant; one that was not used for `seconds` is unloaded."""

    def __init__(self, lifecycle: Lifecycle, store: AdapterStore, prover: Prover, *, quota: int, seconds: float) -> None:
        self._lifecycle, self._store, self._prover = lifecycle, store, prover
        self._quota, self._seconds = quota, seconds
        self._kept: dict[str, Kept] = {}
        self._making: dict[str, asyncio.Task[None]] = {}
        self._made: set[str] = set()  # generations in the store, where no name keeps them
        self._tidying: asyncio.Task[None] | None = None

    def owned(self, name: str, tenant: str) -> bool:
        return name in self._kept and self._kept[name].tenant == tenant

    @staticmethod
    def is_mix(name: str) -> bool:
        """Also one that has expired and drains: it stays nobody else's."""
        return name.startswith(MIX)

    async def name_of(self, members: Sequence[tuple[Resident, float]], tenant: str) -> str:
        """The name under which this mix is served, after it has been made and proven. Raises InputInvalid, RateLimited."""
        rounded = sorted((resident.id, round(weight, 2)) for resident, weight in members)
        name = MIX + hashlib.sha256(json.dumps([tenant, rounded]).encode()).hexdigest()[:20]
        await self._expire()
        live = self._lifecycle.live.get(name)
        if live and not live.loaded and not live.folder.is_dir():  # whoever tidied up the store could not know of it
            await self._lifecycle.delete(name)
        if name not in self._lifecycle.live:
            _check(members)
            if name in self._kept and (error := self._kept[name].error):
                raise error.with_traceback(None)
            mine = [kept for kept in self._kept.values() if kept.tenant == tenant]
            if name not in self._kept and len(mine) >= self._quota:
                wait = max(1.0, min(self._until(kept) for kept in mine) - time.monotonic())
                raise RateLimited("mix", f"you have {len(mine)} mixes: at most {self._quota}", wait)
            self._kept.setdefault(name, Kept(tenant, time.monotonic()))
            if self._tidying is None or self._tidying.done():
                self._tidying = asyncio.create_task(self._tidied(), name="expired mixes")
            task = self._making.get(name)
            if task is None:
                weighted = {resident.id: (resident, weight) for resident, weight in members}
                task = self._making[name] = asyncio.create_task(self._make(name, list(weighted.values())))
                task.add_done_callback(lambda done: (self._making.pop(name, None), done.cancelled() or done.exception()))
            try:
                await asyncio.shield(task)
            except EngineBusy:  # it may be made as soon as the engine is back
                self._kept.pop(name, None)
                raise
            except EmbedftError as error:
                self._kept[name] = Kept(tenant, time.monotonic(), error)
                raise
        self._kept[name].used = time.monotonic()
        return name

    def _until(self, kept: Kept) -> float:
        return kept.used + (min(FAILED_SECONDS, self._seconds) if kept.error else self._seconds)

    async def _make(self, name: str, members: list[tuple[Resident, float]]) -> None:
        engine = members[0][0].engine
        folders: list[tuple[Path, float]] = [(resident.folder, round(weight, 2)) for resident, weight in members]
        with self._store.stage() as stage:
            await self._prover.prove("mix", stage, name=name, engine=engine, members=folders)
            identity = await asyncio.to_thread(self._store.add, stage, renew=False)
        self._made.add(identity)
        await self._lifecycle.put(name, source=identity, named=False)

    async def _tidied(self) -> None:
        """Each goes when its time is over, though nobody asks for another, and its files once it has drained."""
        while self._kept or self._made:
            due = min(map(self._until, self._kept.values()), default=time.monotonic() + DRAINING_SECONDS)
            await asyncio.sleep(max(LEAST_SECONDS, due - time.monotonic()))
            await self._expire()

    async def _expire(self) -> None:
        now = time.monotonic()
        for name in [name for name, kept in self._kept.items() if now > self._until(kept) and name not in self._making]:
            del self._kept[name]
            try:
                await self._lifecycle.delete(name)
            except AdapterNotFound:
                continue
        if not self._making:
            await self._discard({identity for identity in self._made if not self._lifecycle.holds(identity)})

    async def close(self) -> None:
        """Once nothing is served any more: no mix is left in the store."""
        if self._tidying is not None:
            self._tidying.cancel()
        await self._discard(set(self._made))

    async def _discard(self, spent: set[str]) -> None:
        self._made -= spent
        for identity in spent:
            with contextlib.suppress(OSError, EmbedftError):  # then it stays until somebody tidies up
                await asyncio.to_thread(self._store.discard, identity)


def _check(members: Sequence[tuple[Resident, float]]) -> None:
    first = members[0][0]
    if not 1 <= len(members) <= MAX_MEMBERS or len({resident.id for resident, _ in members}) != len(members):
        raise InputInvalid("mix_invalid", f"a mix has 1 to {MAX_MEMBERS} adapters, each once", "adapter")
    if any(round(weight, 2) == 0 for _, weight in members):
        raise InputInvalid("mix_invalid", "a weight is rounded to 0.01 and must not be 0", "adapter")
    for resident, _ in members:
        different = [field for field in _ALIKE if getattr(resident.passport, field) != getattr(first.passport, field)]
        if resident.engine is not first.engine or different:
            why = ", ".join(different) or "base"
            raise InputInvalid("mix_incompatible", f"{first.name!r} and {resident.name!r} differ in {why}: they cannot be mixed", "adapter")
    limit, rank = first.engine.config.max_lora_rank, sum(resident.passport.r for resident, _ in members)
    if rank > limit:
        raise InputInvalid("mix_rank", f"the mix has rank {rank}, this engine's limit is {limit} (max_lora_rank)", "adapter")
