"""An engine: one base in memory behind one supervised process. Knows which base it holds; not which adapters."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from embedft.adapters.passport import Passport, base_said
from embedft.base import base_folder
from embedft.encode import EncodeSettings, TextPreparer
from embedft.model_folder import BaseInfo, describe, own_template, template_hash
from embedft.vectors import published_settings, text_length
from serve.config import BaseConfig, ServerConfig
from serve.engines.command import engine_command, engine_key
from serve.engines.settings import KEY, EngineSettings
from serve.errors import NotReady
from serve.proxy import EngineClient
from serve.supervisor import Command, Supervisor

Answer = TypeVar("Answer")
BASE = "base"  # what every engine calls its base


@dataclass(eq=False)
class Engine:
    """`lock` is held while adapters are loaded or unloaded; requests never take it.

    `retry_seconds`: how long after its beginning a request may be asked a second time.
    """

    config: BaseConfig
    folder: Path
    info: BaseInfo
    client: EngineClient
    supervisor: Supervisor
    retry_seconds: float = 120.0
    retries: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def max_length(self) -> int:
        """Tokens that its process takes at most."""
        return self.info.takes(self.config.max_length)

    def reads(self, passport: Passport | None = None) -> int:
        """Tokens of a request that count: all that the process takes, but of a text for vectors what its maker was trained to read."""
        return text_length(self.info, passport, self.max_length) if self.config.task == "embedding" else self.max_length

    @property
    def public_model(self) -> str:
        """What a passport may call this base: no path of this machine."""
        model = self.config.model
        return Path(model).name if Path(model).expanduser().is_dir() or Path(model).is_absolute() else model

    @property
    def said(self) -> str:
        return base_said(self.public_model, self.info.quantization, self.info.fingerprint)

    @cached_property
    def template_hash(self) -> str:
        """Of the chat template that it renders by: the base's own."""
        return template_hash(own_template(self.folder))

    async def asked(self, call: Callable[[EngineClient], Awaitable[Answer]]) -> Answer:
        """`call`, which changes nothing and whose answer is always the same: asked again, once, when the engine dies under it.

        Raises NotReady where it is not back, with its adapters, before the request's time is over.
        """
        deadline = time.monotonic() + self.retry_seconds
        try:
            self.supervisor.require_ready()
            return await call(self.client)
        except NotReady:
            if not await self.supervisor.back(deadline):
                raise
        self.retries += 1
        return await call(self.client)

    def preparer(self, settings: EncodeSettings) -> TextPreparer:
        return TextPreparer(self.folder, settings)


def create_engine(base: BaseConfig, server: ServerConfig, folder: Path, *, prepare: Callable[["Engine"], Awaitable[None]]) -> Engine:
    """Describe the base, quantizing it first if need be, and lay out (not start) its process under `folder` (0700)."""
    kind = base.engine or "peft"
    weights = base_folder(base.spec)
    info = describe(weights)
    socket, key = folder / f"{base.name}.sock", engine_key()
    settings = EngineSettings(
        max_loras=base.max_loras,
        max_lora_rank=base.max_lora_rank,
        cores=base.cores,
        max_length=base.max_length,
        kv_gib=base.kv_gib,
        max_cpu_loras=base.slots,
        tool_parser=base.tool_parser,
        max_tokens=server.limits.max_tokens,
    )
    argv, env = engine_command(kind, folder=weights, task=base.task, socket=socket, settings=settings, key=key)
    env = {**env, KEY: key, "EMBEDFT_HIDDEN_SIZE": str(info.hidden_size)}
    client = EngineClient(base.name, socket, key)

    async def ready() -> None:
        await warm_up(engine)
        await prepare(engine)

    supervisor = Supervisor(
        base.name,
        Command(argv, env, socket, folder / f"{base.name}.log"),
        healthy=client.healthy,
        prepare=ready,
        start_seconds=server.start_seconds,
        stop_seconds=server.stop_seconds,
    )
    engine = Engine(base, weights, info, client, supervisor, retry_seconds=server.limits.queue_seconds)
    return engine


async def warm_up(engine: Engine) -> None:
    """The first answer of a fresh engine may take tens of seconds: have it before anyone waits for it."""
    if engine.config.task == "cross_encoder":
        await engine.client.call("/v1/score", {"query": "warm", "documents": ["up"]})
    elif engine.config.task == "embedding":
        ids = engine.preparer(published_settings(engine.info, engine.reads())).prepare(["warm up"]).ids
        await engine.client.vectors(BASE, ids)
    else:
        await engine.client.call("/v1/completions", {"model": BASE, "prompt": "warm up", "max_tokens": 2, "temperature": 0.0})
