"""What a disk, an engine or a fault of our own does: told in words, with a code, and nothing else stops."""

import asyncio
import json
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from embedft.errors import AdapterNotFound, EngineBusy
from serve.access import AccessLog
from serve.aliases import Aliases
from serve.app import create_app
from serve.config import ServerConfig
from serve.engines.peft.bank import AdapterBank
from serve.errors import NotReady
from serve.gateway import Gateway
from serve.link.gateway import Link
from serve.proxy import EngineClient, EngineLacks
from serve.supervisor import Command, Supervisor
from tests.serve.test_choice import refused
from tests.serve.world import Start, World, fill_adapter, put_adapter, wait_for


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 5}', '{"x": {"a": "much"}}', '{"x": {}}', '{"x": {"a": 2, "b": -2}}'])
def test_aliases_that_cannot_be_read_are_none_until_one_is_put(tmp_path: Path, content: str) -> None:
    (tmp_path / "aliases.json").write_text(content)
    aliases = Aliases(tmp_path)
    assert aliases.all == {}
    assert "is damaged" in (aliases.damaged or "")
    aliases.put("y", {"a": 1})
    assert (aliases.all, aliases.damaged) == (Aliases(tmp_path).all, None) == ({"y": {"a": 1}}, None)


def test_aliases_that_cannot_be_read_are_told_at_the_start_and_stop_nothing_else(world: World, start: Start) -> None:
    (world.store.root / "aliases.json").write_text("{")
    server = start()
    wait_for(lambda: "aliases.json in the store is damaged" in server.log.read_text())
    assert server.client.get("/v1/aliases").json()["data"] == {}
    assert server.post("/v1/embeddings", {"input": "x", "adapter": "a"}).status_code == 200


def test_an_engines_own_words_for_what_it_lacks_reach_nobody(tmp_path: Path) -> None:
    client = EngineClient("words", tmp_path / "s", "key")
    told = b'{"error": {"message": "no adapter named x: there are secret", "code": "adapter_not_found"}}'
    with pytest.raises(EngineLacks) as lacks:
        client._check(404, told)  # pyright: ignore[reportPrivateUsage]
    assert "secret" not in str(lacks.value)
    with pytest.raises(AdapterNotFound) as bank:
        AdapterBank._known(cast("Any", SimpleNamespace(names=["secret"])), "x")  # pyright: ignore[reportPrivateUsage]
    assert "secret" not in str(bank.value)


def test_an_engine_that_is_away_is_no_fault_of_the_adapter_and_one_that_stays_busy_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.proxy.UNLOAD_SECONDS", 0.2)
    asked: list[str] = []

    async def busy(_: EngineClient, path: str, body: Any) -> None:
        asked.append(path)
        raise EngineBusy("it is generating")

    async def run() -> None:
        client = EngineClient("words", tmp_path / "s", "key")
        with pytest.raises(NotReady):
            await client.load("x@1", tmp_path)
        with pytest.raises(NotReady):
            await client.unload("x@1")
        monkeypatch.setattr(EngineClient, "_done", busy)
        async with asyncio.timeout(5):
            with pytest.raises(EngineBusy):
                await client.unload("x@1")
        assert len(asked) > 1

    asyncio.run(run())


def test_a_fault_that_nobody_foresaw_is_a_500_with_its_id_in_answer_and_log(tmp_path: Path) -> None:
    lines: list[str] = []
    config = ServerConfig(bases=(cast("Any", {"name": "texts", "model": "x", "task": "embedding"}),), adapters=tmp_path, access_log=True)

    async def run() -> httpx.Response:
        app = create_app(Gateway(config))

        @app.get("/planted")
        def planted() -> None:
            raise RuntimeError("planted")

        logged = next(middleware for middleware in app.user_middleware if middleware.cls is AccessLog)
        logged.kwargs["write"] = lines.append
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.get("/planted")
            await asyncio.sleep(0)
            return answer

    answer = asyncio.run(run())
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    line = json.loads(lines[0])
    assert (line["status"], line["id"]) == (500, answer.headers["x-request-id"])


def test_a_put_that_the_disk_refuses_changes_nothing(world: World, start: Start) -> None:
    first = put_adapter(world.store, "x", world.texts, seed=50)
    server = start()
    with world.store.stage() as folder:
        fill_adapter(folder, "x", world.texts, seed=51, scale=1.0, task="embedding")
        second = world.store.add(folder)
    names = world.store.root / "names"
    names.rename(world.store.root / "kept")
    names.write_text("")  # where a pointer can be written no more
    refused(server.put("x", {"source": second}), 507, "storage_failed")
    names.unlink()
    (world.store.root / "kept").rename(names)
    assert server.post("/v1/embeddings", {"input": "q", "adapter": "x"}).headers["x-embedft-adapter"] == f"x@{first[:12]}"
    assert world.store.current("x") == first
    wait_for(lambda: [row["adapter"] for row in server.events("unload")] == [f"x@{second[:12]}"])
    assert server.put("x", {"source": second}).status_code == 200


def test_an_engine_that_cannot_be_started_again_costs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.supervisor.BACKOFF", (0.01,))
    files = Path("/proc/self/fd")

    async def healthy() -> bool:
        return True

    async def prepare() -> None:
        return

    async def run() -> None:
        command = Command(["sleep", "60"], {}, tmp_path / "s", tmp_path / "log")
        supervisor = Supervisor("x", command, healthy=healthy, prepare=prepare, start_seconds=10, stop_seconds=1)
        await supervisor.start()
        before = len(list(files.iterdir()))
        (tmp_path / "log").unlink()
        (tmp_path / "log").mkdir()  # as a disk that takes no file
        assert supervisor._process is not None  # pyright: ignore[reportPrivateUsage]
        supervisor._process.kill()  # pyright: ignore[reportPrivateUsage]
        while not supervisor.last_failure:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        assert len(list(files.iterdir())) <= before + 2
        await supervisor.stop()

    asyncio.run(run())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_an_engine_that_hangs_up_as_it_is_asked_is_an_engine_that_is_away(tmp_path: Path, loop: str) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "s"))
    listening.listen(50)

    def hang_up() -> None:
        while True:
            try:
                listening.accept()[0].close()
            except OSError:
                return

    threading.Thread(target=hang_up, daemon=True).start()

    async def run() -> None:
        for _ in range(30):
            link = Link(str(tmp_path / "s"), "key")
            with pytest.raises(OSError) as told:  # noqa: PT011  # whichever it is, the engine went away
                async with asyncio.timeout(5), link.call("/v1/vectors", b"{}") as reply:
                    await reply.read()
            assert not isinstance(told.value, TimeoutError)

    if loop == "uvloop":
        pytest.importorskip("uvloop").run(run())
    else:
        asyncio.run(run())
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def test_an_adapter_of_a_bases_name_is_listed_with_the_reason_and_never_mistaken_for_it(world: World, start: Start) -> None:
    put_adapter(world.store, "texts", world.texts, seed=195)
    server = start()
    listed = {row["name"]: row for row in server.client.get("/v1/adapters").json()["data"]}
    assert (listed["texts"]["state"], "a base has that name" in listed["texts"]["reason"]) == ("unserved", True)
    assert [row["id"] for row in server.client.get("/v1/models").json()["data"]].count("texts") == 1
    answer = server.post("/v1/embeddings", {"input": "x", "adapter": "texts"})
    refused(answer, 404, "adapter_not_found")
    assert server.post("/v1/embeddings", {"input": "x", "model": "texts"}).headers["x-embedft-adapter"] == "base"
