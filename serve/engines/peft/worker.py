"""The one thread that touches the model: it loads, unloads, embeds and generates, a step at a time. Knows no HTTP.

Between two steps of the running batch it does what else was asked, so an adapter comes and goes without stopping anyone.
"""

import asyncio
import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.errors import AdapterError, EngineBusy, EngineFailed, InputInvalid
from serve.engines.peft.bank import AdapterBank, Group
from serve.engines.peft.batch import NOT_FINITE, Batch, Row, Step

if TYPE_CHECKING:
    import numpy as np

    from embedft.base import Base
    from embedft.encode import Encoder

GATHER_SHARE = 0.5  # of the last pass: how long embedding requests wait until they are as many again
FULL_INPUTS = 64  # of so many nobody waits for more, and no pass has more
PASS_TOKENS = 8192  # of one pass over texts: bounds how long a short request waits for a long one's
MAX_WAITING = 1024


@dataclass(eq=False)
class _Embed:
    """`order`: its texts by their length; of them `at` have their vectors, in `found`."""

    adapter: str | None
    ids: list[list[int]]
    order: list[int] = field(init=False)
    at: int = 0
    found: "np.ndarray | None" = None
    done: "Callable[[np.ndarray | Exception], None]" = field(init=False)
    cancelled: bool = False  # nobody waits for it any more

    def __post_init__(self) -> None:
        self.order = sorted(range(len(self.ids)), key=lambda place: len(self.ids[place]))

    def take(self, places: list[int], vectors: "np.ndarray") -> None:
        """The vectors of the next texts."""
        import numpy as np

        if self.found is None:
            self.found = np.empty((len(self.ids), vectors.shape[1]), dtype=vectors.dtype)
        self.found[places] = vectors
        self.at += len(places)


@dataclass(eq=False)
class _Call:
    function: Callable[[], Any]
    done: Callable[[Any], None]


class Worker:
    """Start it once; its coroutines may be awaited from one event loop."""

    def __init__(self, base: "Base", encoder: "Encoder | None") -> None:
        self.bank = AdapterBank(base)
        self.batches: dict[Group, Batch] = {}
        self.encoder = encoder
        self._inbox: queue.SimpleQueue[Row | _Embed | _Call] = queue.SimpleQueue()
        self._names: tuple[str, ...] = ()
        self._company, self._pass_seconds = 1, 0.0  # embedding requests that were here at one time of late, and what a pass took
        threading.Thread(target=self._run, name="model", daemon=True).start()

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters' names, as of now."""
        return self._names

    async def load(self, name: str, folder: Path) -> None:
        content = await asyncio.to_thread(self.bank.read, name, folder)  # the model goes on meanwhile
        await self._call(lambda: self.bank.put(name, content))

    async def unload(self, name: str) -> None:
        """Raises EngineBusy while a sequence uses it, AdapterNotFound."""

        def unload() -> None:
            if any(batch.uses(name) for batch in self.batches.values()):
                raise EngineBusy(f"adapter {name!r} is generating: unload it when its requests are done")
            self.bank.unload(name)

        await self._call(unload)

    async def embed(self, adapter: str | None, ids: list[list[int]]) -> "np.ndarray":
        """(n,) rows of token ids → (n, dimensions) float32."""
        embed = _Embed(adapter, ids)

        def put(done: "Callable[[np.ndarray | Exception], None]") -> None:
            embed.done = done
            self._inbox.put(embed)

        try:
            return await self._ask(put)
        except asyncio.CancelledError:
            embed.cancelled = True
            raise

    def generate(self, rows: Sequence[Row]) -> None:
        """Queue all of `rows`, or none: their `emit` tells the rest. Raises InputInvalid, EngineBusy."""
        if len(rows) > MAX_WAITING:
            raise InputInvalid("too_many_inputs", f"{len(rows)} answers: at most {MAX_WAITING} in one request", "prompt")
        waiting = self._inbox.qsize() + sum(len(batch.waiting) for batch in list(self.batches.values()))
        if waiting + len(rows) > MAX_WAITING:
            raise EngineBusy(f"{waiting} sequences are waiting, and {MAX_WAITING} may: retry later")
        for row in rows:
            self._inbox.put(row)

    async def _call(self, function: Callable[[], Any]) -> Any:
        return await self._ask(lambda done: self._inbox.put(_Call(function, done)))

    async def _ask(self, put: Callable[[Callable[[Any], None]], None]) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(outcome: Any) -> None:
            if future.cancelled():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        def done(outcome: Any) -> None:
            loop.call_soon_threadsafe(settle, outcome)

        put(done)
        return await future

    def _run(self) -> None:
        while True:
            embeds = self._drain()
            if embeds:
                self._embed(embeds)
            for group, batch in list(self.batches.items()):
                try:
                    batch.step()
                except Exception as error:
                    batch.fail(EngineFailed(f"the model failed: {error}"))
                if not batch:
                    del self.batches[group]

    def _drain(self) -> list[_Embed]:
        """Take in all that waits; block only when there is nothing to do.

        Embedding requests wait for as many as there were of late, as clients who ask again do so at about the same time: a pass over
        eight short texts takes little longer than one over four. Nobody waits longer than GATHER_SHARE of a pass.
        """
        embeds: list[_Embed] = []
        until: float | None = None
        while True:
            try:
                if not self.batches and not embeds:
                    item = self._inbox.get()
                elif embeds and not self.batches and until is not None:
                    item = self._inbox.get(timeout=max(until - time.monotonic(), 0))
                else:
                    item = self._inbox.get_nowait()
            except queue.Empty:
                return embeds
            if isinstance(item, Row):
                self._queue(item)
            elif isinstance(item, _Embed):
                if item.cancelled:
                    continue
                embeds.append(item)
                enough = len(embeds) >= self._company or sum(len(embed.ids) for embed in embeds) >= FULL_INPUTS
                until = 0.0 if enough else until or time.monotonic() + GATHER_SHARE * self._pass_seconds
            else:
                outcome = self._outcome(item.function)
                self._names = tuple(self.bank.names)  # before whoever asked is told: the next request may name what was loaded
                item.done(outcome)

    def _queue(self, row: Row) -> None:
        try:
            group = self.bank.group(row.adapter)
        except AdapterError as error:
            row.emit(Step(None, finish="error", error=error))
            return
        self.batches.setdefault(group, Batch(self.bank, group)).waiting.append(row)

    @staticmethod
    def _outcome(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            return error

    def _embed(self, requests: list[_Embed]) -> None:
        """All requests of a group in one batch, adapters mixed. Each gets its own vectors, or its own error."""
        groups: dict[Group, list[_Embed]] = {}
        self._company = 1
        for request in requests:
            if request.cancelled:
                continue
            try:
                groups.setdefault(self.bank.group(request.adapter), []).append(request)
            except AdapterError as error:
                request.done(error)
        for group, members in groups.items():
            self._embed_group(group, members, here=len(requests))

    def _embed_group(self, group: Group, requests: list[_Embed], *, here: int) -> None:
        """One pass over some texts of each request. Those that have more of them come again, behind those that had none in it."""
        import numpy as np

        assert self.encoder is not None
        began, shares = time.monotonic(), _shares(requests)
        ids = [request.ids[place] for request, places in zip(requests, shares, strict=True) for place in places]
        adapters = [request.adapter for request, places in zip(requests, shares, strict=True) for _ in places]
        encoder = copy.copy(self.encoder)
        encoder.model = self.bank.model_of(group)
        vectors: np.ndarray | EngineFailed
        try:
            with self.bank.threads.of("embed", sum(map(len, ids))):
                vectors = encoder.encode_ids(ids, **self.bank.rows(adapters))
        except Exception as error:
            vectors = EngineFailed(f"the model failed: {error}")
        self._pass_seconds = time.monotonic() - began
        self._company = max(self._company, here + self._inbox.qsize())  # before anyone is answered, who may ask again
        start = 0
        for request in (request for request, places in zip(requests, shares, strict=True) if not places):
            self._inbox.put(request)
        for request, places in zip(requests, shares, strict=True):
            if not places:
                continue
            if isinstance(vectors, EngineFailed):
                request.done(vectors)
                continue
            request.take(places, vectors[start : start + len(places)])
            start += len(places)
            if request.found is None or request.at < len(request.ids):
                self._inbox.put(request)
            else:
                request.done(request.found if np.isfinite(request.found).all() else EngineFailed(NOT_FINITE))


def _shares(requests: list[_Embed]) -> list[list[int]]:
    """Which texts of each request are in the next pass: in turn one of each, until it is full."""
    shares: list[list[int]] = [[] for _ in requests]
    rows = tokens = 0
    for turn in range(max(len(request.ids) - request.at for request in requests)):
        for request, share in zip(requests, shares, strict=True):
            if request.at + turn >= len(request.ids):
                continue
            place = request.order[request.at + turn]
            rows, tokens = rows + 1, tokens + len(request.ids[place])
            if rows > 1 and (rows > FULL_INPUTS or tokens > PASS_TOKENS):
                return shares
            share.append(place)
    return shares
