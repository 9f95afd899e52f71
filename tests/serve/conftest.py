"""One shared server for tests that change nothing, and a fresh world for those that do."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serve.world import Server, World, make_world


@pytest.fixture(scope="session")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def shared(shared_world: World) -> Iterator[Server]:
    server = shared_world.start(token_latency=0.01)
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
