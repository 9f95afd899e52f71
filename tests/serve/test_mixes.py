"""What mixes leave behind: nothing in the store, no metrics of their own. A gateway in this process, fake engines, no real prover."""

import asyncio
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from serve.config import ServerConfig
from serve.gateway import Gateway
from serve.resident import Resident
from tests.serve.world import World, fill_adapter, put_adapter


@asynccontextmanager
async def mixing(world: World, **base: Any) -> AsyncGenerator[tuple[Gateway, list[Resident]]]:
    """A running gateway, and two adapters that may be mixed."""
    put_adapter(world.store, "a2", world.texts, seed=20, dimensions=(8,))
    bases = [{"name": "texts", "model": str(world.texts), "task": "embedding", "engine": "fake", **base}]
    gateway = Gateway(ServerConfig.model_validate({"bases": bases, "adapters": world.store.root}))

    async def prove(_: str, folder: Path, *, name: str, **__: Any) -> None:
        fill_adapter(folder, name, world.texts, seed=int(name[-6:], 16), scale=1.0, task="embedding")

    gateway.mixes._prover.prove = prove  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    try:
        await gateway.start()
        yield gateway, [gateway.lifecycle.get(name) for name in ("a", "a2")]
    finally:
        await gateway.stop()


async def asked(gateway: Gateway, members: list[Resident], weight: float) -> str:
    """The generation of a mix that was asked for, and answers."""
    name = await gateway.mixes.name_of([(members[0], weight), (members[1], 1.0)], "anna")
    async with gateway.lifecycle.lease(name) as resident:
        assert resident.loaded
        return resident.generation


def there(world: World, generation: str) -> bool:
    return (world.store.root / "objects" / generation).is_dir()


def test_a_mix_that_has_expired_leaves_the_store_and_so_do_all_at_the_end(world: World) -> None:
    async def check() -> None:
        async with mixing(world) as (gateway, members):
            expired = await asked(gateway, members, 0.1)
            gateway.mixes._kept[next(iter(gateway.mixes._kept))].used -= 1e6  # pyright: ignore[reportPrivateUsage]
            await asked(gateway, members, 0.2)
            async with asyncio.timeout(5):
                while gateway.lifecycle.holds(expired):
                    await asyncio.sleep(0.01)
            kept = await asked(gateway, members, 0.3)
            assert (there(world, expired), there(world, kept)) == (False, True)
        assert not there(world, kept)
        assert {generation for generation in world.store.names().values() if there(world, generation)} == {*world.store.names().values()}

    asyncio.run(check())


def test_a_mix_is_made_again_where_its_files_were_tidied_away(world: World) -> None:
    async def check() -> None:
        async with mixing(world, slots=1) as (gateway, members):
            mixed = await asked(gateway, members, 0.1)
            async with gateway.lifecycle.lease("a"):
                assert mixed not in world.store.collect(), "not by us, while a server uses the store"
                shutil.rmtree(world.store.folder(mixed))
            assert await asked(gateway, members, 0.1) == mixed

    asyncio.run(check())


def test_metrics_count_all_mixes_as_one(world: World) -> None:
    async def check() -> None:
        async with mixing(world, slots=1) as (gateway, members):
            for weight in (0.1, 0.2, 0.3):
                await asked(gateway, members, weight)
            loading = gateway.lifecycle.loading
            assert {key: count for key, count in loading.loads.items() if key[0].startswith("mix-")} == {("mix-*", "loaded"): 3}
            assert {name for name in loading.evictions if name.startswith("mix-")} == {"mix-*"}

    asyncio.run(check())
