"""All that one server holds: its engines, their adapters, its meters. Starts the engines together and ends them together."""

import asyncio
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from embedft.adapters.store import AdapterStore
from serve.admission import Admission
from serve.aliases import Aliases
from serve.config import ServerConfig
from serve.engine import Engine, create_engine
from serve.importing import Importer
from serve.lifecycle import Lifecycle
from serve.metrics import Meters
from serve.mixes import Mixes
from serve.prover import Prover
from serve.tenants import Tenants


class Gateway:
    """`start` returns when every engine is warm and every matching adapter has passed its probes; until then `ready` is false."""

    def __init__(self, config: ServerConfig, *, admin_token: str | None = None) -> None:
        self.config = config
        self.store = AdapterStore(config.adapters)
        self.lifecycle = Lifecycle((), self.store)
        self.meters = Meters(self.lifecycle)
        self.admin_token = admin_token or os.environ.get("EMBEDFT_ADMIN_TOKEN") or secrets.token_urlsafe(24)
        self.tenants = Tenants(config.tenants, token=self.admin_token)
        self.admission = Admission(config.limits, self.meters, shared=self.tenants.keyed)
        prover, limits = Prover(), config.limits
        self.importer = Importer(self.store, self.lifecycle.engines, prover, config.sources)
        self.mixes = Mixes(self.lifecycle, self.store, prover, quota=limits.mixes, seconds=limits.mix_seconds)
        self.aliases = Aliases(self.store.root)
        self.started = False
        self._use: int | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="embedft-"))  # 0700
        if len(str(self._folder)) > 40:  # a socket's path may have 107 bytes
            shutil.rmtree(self._folder)
            self._folder = Path(tempfile.mkdtemp(prefix="embedft-", dir="/tmp"))

    @property
    def ready(self) -> bool:
        engines = self.lifecycle.engines
        return len(engines) == len(self.config.bases) and all(engine.supervisor.state == "ready" for engine in engines.values())

    async def start(self) -> None:
        """Raises what the first failing base or engine raises, after the others have been stopped by `stop`."""
        self._use = await asyncio.to_thread(self.store.use)
        for base in self.config.bases:
            engine = await asyncio.to_thread(create_engine, base, self.config, self._folder, prepare=self._populate)
            self.lifecycle.engines[engine.name] = engine
        starting = [asyncio.create_task(engine.supervisor.start()) for engine in self.lifecycle.engines.values()]
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            raise
        self.started = True

    async def _populate(self, engine: Engine) -> None:
        await self.lifecycle.populate(engine)

    async def stop(self) -> None:
        """End every engine and remove the folder of their sockets."""
        engines = list(self.lifecycle.engines.values())
        await asyncio.gather(*(engine.supervisor.stop() for engine in engines), return_exceptions=True)
        for engine in engines:
            engine.client.close()
        await self.mixes.close()
        if self._use is not None:
            os.close(self._use)
            self._use = None
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
