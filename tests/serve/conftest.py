"""One shared server for tests that change nothing, and a fresh world for those that do."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fixtures_lm import tiny_llama
from tests.serve.world import Server, World, make_world, put_adapter, write_base


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def shared(shared_world: World) -> Iterator[Server]:
    server = shared_world.start(token_latency=0.01)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def changing_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Each test that changes something brings adapters of its own names."""
    world = make_world(tmp_path_factory.mktemp("changing"))
    put_adapter(world.store, "foreign", write_base(world.folder / "other", seed=9), seed=1)
    put_adapter(world.store, "broken", world.texts, seed=2, scale=0.5)
    put_adapter(world.store, "twice", world.texts, seed=3)
    put_adapter(world.store, "twice", world.texts, seed=4, scale=0.5)
    return world


@pytest.fixture(scope="session")
def changing(changing_world: World) -> Iterator[Server]:
    server = changing_world.start(token_latency=0.005)
    yield server
    server.stop()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture
def start(world: World) -> Iterator[Callable[..., Server]]:
    """Start a server over `world`; it is stopped after the test."""
    running: list[Server] = []

    def begin(**options: object) -> Server:
        running.append(world.start(**options))  # pyright: ignore[reportArgumentType]
        return running[-1]

    yield begin
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def plain_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("plain") / "base")
