"""The one thread that touches the model: it loads, unloads, embeds and generates, a step at a time. Knows no HTTP.

Between two steps of the running batch it does what else was asked, so an adapter comes and goes without stopping anyone.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.errors import AdapterError, EngineBusy, EngineFailed
from serve.engines.peft.bank import AdapterBank, read
from serve.engines.peft.batch import Batch, Row

if TYPE_CHECKING:
    import numpy as np

    from embedft.base import Base
    from embedft.encode import Encoder

GATHER_SECONDS = 0.002  # how long the first of several embedding requests waits for others
MAX_WAITING = 1024


@dataclass(eq=False)
class _Embed:
    adapter: str | None
    ids: list[list[int]]
    done: "Callable[[np.ndarray | Exception], None]"


@dataclass(eq=False)
class _Call:
    function: Callable[[], Any]
    done: Callable[[Any], None]


class Worker:
    """Start it once; its coroutines may be awaited from one event loop."""

    def __init__(self, base: "Base", encoder: "Encoder | None") -> None:
        self.bank = AdapterBank(base)
        self.batch = Batch(self.bank)
        self.encoder = encoder
        self._inbox: queue.SimpleQueue[Row | _Embed | _Call] = queue.SimpleQueue()
        self._names: tuple[str, ...] = ()
        threading.Thread(target=self._run, name="model", daemon=True).start()

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters' names, as of now."""
        return self._names

    async def load(self, name: str, folder: Path) -> None:
        config, tensors = await asyncio.to_thread(read, name, folder)  # the disk's time is not the model's
        await self._call(lambda: self.bank.put(name, config, tensors))

    async def unload(self, name: str) -> None:
        """Raises EngineBusy while a sequence uses it, AdapterNotFound."""

        def unload() -> None:
            if self.batch.uses(name):
                raise EngineBusy(f"adapter {name!r} is generating: unload it when its requests are done")
            self.bank.unload(name)

        await self._call(unload)

    async def embed(self, adapter: str | None, ids: list[list[int]]) -> "np.ndarray":
        """(n,) rows of token ids → (n, dimensions) float32."""
        return await self._ask(lambda done: self._inbox.put(_Embed(adapter, ids, done)))

    def generate(self, row: Row) -> None:
        """Queue `row`; its `emit` tells the rest. Raises EngineBusy."""
        if self._inbox.qsize() > MAX_WAITING:
            raise EngineBusy(f"{MAX_WAITING} requests are waiting: retry later")
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
            if self.batch:
                try:
                    self.batch.step()
                except Exception as error:
                    self.batch.fail(EngineFailed(f"the model failed: {error}"))

    def _drain(self) -> list[_Embed]:
        """Take in all that waits; block only when there is nothing to do. Embedding requests gather for 2 ms."""
        embeds: list[_Embed] = []
        until: float | None = None
        while True:
            try:
                if not self.batch and not embeds:
                    item = self._inbox.get()
                elif embeds and not self.batch and until is not None:
                    item = self._inbox.get(timeout=max(until - time.monotonic(), 0))
                else:
                    item = self._inbox.get_nowait()
            except queue.Empty:
                return embeds
            if isinstance(item, Row):
                self.batch.waiting.append(item)
            elif isinstance(item, _Embed):
                until = until or time.monotonic() + GATHER_SECONDS
                embeds.append(item)
            else:
                item.done(self._outcome(item.function))
                self._names = tuple(self.bank.names)
                if self.encoder is not None:
                    self.encoder.model = self.bank.model  # and so lets go of what was unloaded

    @staticmethod
    def _outcome(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            return error

    def _embed(self, requests: list[_Embed]) -> None:
        """All requests in one batch, adapters mixed. Each gets its own vectors, or its own error."""
        assert self.encoder is not None
        ready: list[_Embed] = []
        for request in requests:
            try:
                self.bank.rows([request.adapter])
                ready.append(request)
            except AdapterError as error:
                request.done(error)
        ids = [row for request in ready for row in request.ids]
        adapters = [request.adapter for request in ready for _ in request.ids]
        if not ids:
            return
        try:
            vectors = self.encoder.encode_ids(ids, **self.bank.rows(adapters))
        except Exception as error:
            for request in ready:
                request.done(EngineFailed(f"the model failed: {error}"))
            return
        start = 0
        for request in ready:
            request.done(vectors[start : start + len(request.ids)])
            start += len(request.ids)
