"""What the demo does with a server that does not serve everything it trained. (The demo itself: tests/test_readme.py.)"""

from pathlib import Path

import psutil
import pytest

from embedft.demo.session import Server
from embedft.errors import EngineFailed
from tests.serve.world import make_world, put_adapter


def test_an_adapter_that_the_server_refuses_ends_the_demo_by_its_name(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    with Server(world.store.root, engine="fake", log=tmp_path / "whole.log") as server:
        assert server.names("causal_lm") == ["s", "t"]
    put_adapter(world.store, "damaged", world.texts, seed=2, scale=0.5)
    put_adapter(world.store, "a", world.texts, seed=3, scale=0.5)  # the generation before it still serves
    refusing = Server(world.store.root, engine="fake", log=tmp_path / "server.log")
    with pytest.raises(EngineFailed) as refused, refusing:
        pass
    first, *named = str(refused.value).splitlines()
    assert "does not serve what was trained" in first
    assert [line.split(":")[0] for line in named] == ["a", "damaged"]
    assert all("probes" in line for line in named)
    assert not psutil.pid_exists(refusing.process.pid) or psutil.Process(refusing.process.pid).status() == psutil.STATUS_ZOMBIE
