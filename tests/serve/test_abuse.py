"""What one client can do to the others: bodies that cost more than they bring, clients that hang up, names that are not theirs."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from embedft.errors import EngineBusy, InputInvalid, ProbesFailed
from serve.access import Record
from serve.body import DEEPEST, WIDEST, parse
from serve.config import Limits, ServerConfig
from serve.door import Door, Held
from serve.engines.command import engine_command
from serve.engines.peft import bodies
from serve.engines.peft.generation import room_for
from serve.engines.settings import EngineSettings
from serve.errors import QueueFull, RateLimited
from serve.generation_routes import cost_of
from serve.link.gateway import Link
from serve.mixes import Mixes
from serve.schemas import ChatRequest, CompletionRequest, EmbeddingRequest, EmbedRequest, RerankRequest
from serve.supervisor import Command, Supervisor
from serve.tenants import Tenant, TenantEntry, Tenants, new_key
from serve.visible import Visible
from tests.fixtures_embedding import tiny_encoder
from tests.fixtures_lm import tiny_llama
from tests.serve.test_choice import refused
from tests.serve.world import ADMIN, Server, World, fill_adapter, put_adapter, wait_for

Start = Callable[..., Server]
MANY = 5000


def keys(folder: Path, **tenants: dict[str, Any]) -> tuple[str, dict[str, dict[str, str]]]:
    """A keys file of these tenants beside an admin, and what each sends with its requests."""
    entries, headers = [], {}
    for name, more in {"root": {"admin": True}, **tenants}.items():
        key, digest = new_key()
        entries.append({"tenant": name, "key_sha256": digest, **more})
        headers[name] = {"authorization": f"Bearer {key}"}
    (folder / "keys.yaml").write_text(yaml.safe_dump({"tenants": entries}))
    return str(folder / "keys.yaml"), headers


def runs(server: Server, adapter: str, headers: dict[str, str]) -> bool:
    """Whether a request of `adapter` ('' is the base) is at the engine that writes."""
    label = f'embedft_running_requests{{adapter="{adapter}",base="words"}} 1.0'
    return label in server.client.get("/metrics", headers=headers).text


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (EmbeddingRequest, {"input": [{}] * MANY}),
        (EmbeddingRequest, {"input": [[1, "x"]] * MANY}),
        (EmbeddingRequest, {"input": "x", "adapter": [1] * MANY}),
        (EmbedRequest, {"inputs": [1] * MANY}),
        (RerankRequest, {"query": "x", "documents": [1] * MANY}),
        (CompletionRequest, {"prompt": [{}] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop": [1] * MANY}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": ["x"] * MANY}),
        (ChatRequest, {"messages": [{}] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user"}], "tools": [1] * MANY}),
        (bodies.Completion, {"prompt": [{}] * MANY}),
        (bodies.Chat, {"messages": [{"role": "user", "content": [{"type": "image"}] * MANY}]}),
        (bodies.Chat, {"messages": [{"role": "user"}], "tools": [{}] * MANY}),
    ],
)
def test_a_body_of_many_faults_is_refused_for_its_first(schema: type[BaseModel], body: dict[str, Any]) -> None:
    """Each fault is a kilobyte and some microseconds: 16 MiB of them took a minute and gigabytes."""
    with pytest.raises(ValidationError) as told:
        schema.model_validate(body)
    assert told.value.error_count() < 12


@pytest.mark.parametrize(
    "content", [{"a": {str(key): 0 for key in range(WIDEST + 1)}}, json.loads('{"a":' * DEEPEST + "[]" + "}" * DEEPEST)]
)
def test_an_object_too_wide_or_too_deep_is_a_400(content: Any) -> None:
    with pytest.raises(InputInvalid) as told:
        parse(json.dumps(content).encode())
    assert told.value.code == "json_invalid"
    parse(json.dumps({"a": {str(key): 0 for key in range(WIDEST)}}).encode())
    parse(('{"a":' * (DEEPEST - 1) + "[]" + "}" * (DEEPEST - 1)).encode())


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/v1/completions", {"prompt": ["x"] * 65}, "too_many_inputs"),
        ("/v1/completions", {"prompt": "x" * 1_000_001}, "input_too_large"),
        ("/v1/completions", {"prompt": "x", "stop": ["x"] * 17}, "invalid_parameter"),
        ("/v1/completions", {"prompt": "x", "stop": "x" * 257}, "invalid_parameter"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 1_000_001}]}, "input_too_large"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}], "tools": json.loads("[" * 101 + "]" * 101)}, "json_invalid"),
    ],
)
def test_what_one_generating_request_may_hold_is_capped(shared: Server, path: str, body: dict[str, Any], code: str) -> None:
    refused(shared.post(path, {"model": "words", **body}), 400, code)


def test_every_prompt_of_a_request_is_paid_for() -> None:
    one = cost_of(CompletionRequest(prompt="x", max_tokens=100))
    assert cost_of(CompletionRequest(prompt=["x"] * 10, max_tokens=100)) == 10 * (one - 1) + 10 // 4 + 1
    assert cost_of(CompletionRequest(prompt=[[1, 2]] * 10, max_tokens=100)) == 10 * 102 + 1
    assert cost_of(CompletionRequest(prompt=[1, 2], max_tokens=100)) == 103


def test_an_answer_whose_length_was_left_open_ends_at_the_servers_limit(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"context": 100, "vocabulary": 50}
    assert room_for([[1] * 10], None, **asked) == 90
    assert room_for([[1] * 10], None, **asked, most=8) == room_for([[1] * 10], 20, **asked, most=8) == 8
    base, settings = tiny_llama(tmp_path / "llama"), EngineSettings(max_tokens=8)
    for kind, expected in (("peft", ["--max-tokens", "8"]), ("vllm", ["--override-generation-config", '{"max_new_tokens": 8}'])):
        argv, _ = engine_command(kind, folder=base, task="causal_lm", socket=tmp_path / "s", settings=settings)  # pyright: ignore[reportArgumentType]
        assert expected[1] == argv[argv.index(expected[0]) + 1]
    argv, _ = engine_command(
        "peft", folder=tiny_encoder(tmp_path / "texts", pooling="mean"), task="embedding", socket=tmp_path / "s", settings=settings
    )
    assert "--max-tokens" not in argv


def test_a_body_that_comes_too_slowly_is_a_408_and_nobody_else_waits_for_it(world: World, start: Start) -> None:
    file, sent = keys(world.folder, alice={"adapters": ["a"]}, bob={"adapters": ["b"]})
    server = start(keys=file, limits={"body_seconds": 2.0, "held_bytes": 1 << 20})
    host = server.url.partition("//")[2]
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nAuthorization: {sent['alice']['authorization']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {1 << 20}\r\n\r\n{{"
    name, _, port = host.partition(":")
    slow = [socket.create_connection((name, int(port))) for _ in range(8)]
    for one in slow:
        one.sendall(head.encode())
    time.sleep(0.3)
    answer = server.post("/v1/embeddings", {"input": "x", "adapter": "b"}, headers=sent["bob"])
    assert answer.status_code == 200, answer.text
    slow[0].settimeout(10)
    told = b""
    while b"}}" not in told:
        told += slow[0].recv(4096)
    assert told.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in told
    for one in slow:
        one.close()


def test_bytes_are_counted_as_they_come_and_a_quarter_stays_for_the_others() -> None:
    entry = TenantEntry(tenant="root", key_sha256="0" * 64, admin=True)
    base: Any = {"name": "texts", "model": "x", "task": "embedding"}
    config = ServerConfig(bases=(base,), adapters=Path(), tenants=(entry,), limits=Limits(held_bytes=400))
    door = Door(lambda *_: None, config)  # pyright: ignore[reportArgumentType]
    alice, bob, third = Tenant("alice"), Tenant("bob"), Tenant("third")
    first, second, other = Held(door), Held(door), Held(door)
    first.take(250, alice)
    with pytest.raises(RateLimited):
        second.take(60, alice)
    other.take(100, bob)
    with pytest.raises(QueueFull):
        Held(door).take(60, third)
    first.release()
    first.release()
    assert (door.held, alice.held, bob.held) == (100, 0, 100)
    second.take(300, alice)
    alone = Held(Door(lambda *_: None, config))  # pyright: ignore[reportArgumentType]
    alone.take(300, third)
    alone.take(300, third)  # one body alone always fits


def test_a_malformed_origin_is_refused_as_any_other(shared: Server) -> None:
    refused(shared.client.get("/v1/models", headers={"origin": "http://["}), 403, "origin_refused")


def test_clients_that_hung_up_hold_no_place_in_the_queue(start: Start) -> None:
    server = start(token_latency=0.05, base={"places": 1}, limits={"tenant_queue": 3, "queue": 3})
    running = threading.Thread(target=lambda: server.post("/v1/completions", {"prompt": "x", "max_tokens": 80}))
    running.start()
    wait_for(lambda: runs(server, "", ADMIN))
    for _ in range(3):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "gone", "max_tokens": 80}, timeout=0.2)
    time.sleep(0.3)
    answer = server.post("/v1/completions", {"prompt": "alive", "max_tokens": 1})
    running.join()
    assert answer.status_code == 200, answer.text


def test_who_waits_for_an_adapter_that_is_deleted_is_told_of_its_own_alone(world: World, start: Start) -> None:
    put_adapter(world.store, "secret", world.words, seed=77, task="causal_lm")
    file, sent = keys(world.folder, bob={"adapters": ["s", "t"]})
    server = start(keys=file, token_latency=0.05, base={"slots": 1})
    told: list[httpx.Response] = []

    def ask(adapter: str, count: int) -> None:
        told.append(server.post("/v1/completions", {"prompt": "x", "adapter": adapter, "max_tokens": count}, headers=sent["bob"]))

    threads = [threading.Thread(target=ask, args=("s", 80)), threading.Thread(target=ask, args=("t", 1))]
    threads[0].start()
    wait_for(lambda: runs(server, "s", sent["root"]))
    threads[1].start()
    time.sleep(1)
    assert server.client.delete("/v1/adapters/t", headers=sent["root"]).status_code == 200
    for thread in threads:
        thread.join()
    answer = next(one for one in told if one.status_code != 200)
    refused(answer, 404, "adapter_not_found")
    assert answer.json()["error"]["message"] == "no adapter named 't': there are s"


def test_a_mix_is_made_within_its_tenants_limits(world: World, start: Start) -> None:
    put_adapter(world.store, "a2", world.texts, seed=78, dimensions=(8,))
    file, sent = keys(world.folder, bob={"adapters": ["a", "a2"], "limits": {"requests_per_minute": 1}})
    server = start(keys=file)
    assert server.post("/v1/embeddings", {"input": "x", "adapter": "a"}, headers=sent["bob"]).status_code == 200
    mix = {"mix": [{"adapter": "a", "weight": 0.5}, {"adapter": "a2", "weight": 1}]}
    for path, body in (("/v1/embeddings", {"input": "x"}), ("/v1/rerank", {"query": "x", "documents": ["x"]})):
        refused(server.post(path, {**body, "adapter": mix}, headers=sent["bob"]), 429, "requests_limit_exceeded")


def test_a_mix_that_cannot_be_made_is_not_tried_again_at_once_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing, tried = SimpleNamespace(live={}), list[str]()

    async def make(_: Mixes, name: str, members: Any) -> None:
        tried.append(name)
        raise busy if len(tried) == 1 else ProbesFailed(name, "planted")

    def member(name: str) -> Any:
        passport = SimpleNamespace(**dict.fromkeys(("task", "side", "prompts", "pooling", "normalize", "max_length", "template_hash")), r=1)
        return SimpleNamespace(id=f"{name}@1", name=name, passport=passport, engine=engine)

    async def run() -> None:
        mixes, one = Mixes(nothing, cast("Any", None), cast("Any", None), quota=2, seconds=900), [(member("a"), 0.5), (member("b"), 1.0)]  # pyright: ignore[reportArgumentType]
        with pytest.raises(EngineBusy):
            await mixes.name_of(one, "anna")
        for _ in range(3):
            with pytest.raises(ProbesFailed):
                await mixes.name_of(one, "anna")
        assert len(tried) == 2
        with pytest.raises(ProbesFailed):
            await mixes.name_of([(member("a"), 0.6), (member("b"), 1.0)], "anna")
        with pytest.raises(RateLimited) as told:
            await mixes.name_of([(member("a"), 0.7), (member("b"), 1.0)], "anna")
        assert told.value.retry_after <= 60
        monkeypatch.setattr("serve.mixes.FAILED_SECONDS", 0.0)
        with pytest.raises(AttributeError):  # of the lifecycle, which is asked to forget it: it is tried again
            await mixes.name_of(one, "anna")

    busy, engine = EngineBusy("planted"), SimpleNamespace(config=SimpleNamespace(max_lora_rank=64))
    monkeypatch.setattr(Mixes, "_make", make)
    asyncio.run(run())


def test_a_mix_that_has_expired_and_drains_is_shown_to_nobody_else() -> None:
    nothing: Any = None
    gateway: Any = SimpleNamespace(lifecycle=nothing, mixes=Mixes(nothing, nothing, nothing, quota=4, seconds=1), tenants=Tenants())
    assert Visible(gateway, Tenant("anna"), Record(""), key=None).may_use("legal")
    assert not Visible(gateway, Tenant("anna"), Record(""), key=None).may_use("mix-0123456789abcdef0123")


def test_a_request_that_no_engine_saw_costs_no_tokens(world: World, start: Start) -> None:
    file, sent = keys(world.folder, bob={"adapters": ["s"], "limits": {"tokens_per_minute": 6000}})
    server = start(keys=file)
    body = {"prompt": "x", "adapter": "s", "max_tokens": 4000}
    for process in server.processes():
        line = " ".join(process.cmdline())
        if "serve.engines.fake" in line and "causal_lm" in line and "guard" not in line:
            process.kill()
    time.sleep(0.2)
    codes = [server.post("/v1/completions", body, headers=sent["bob"]).json()["error"]["code"] for _ in range(3)]
    assert codes == ["engine_not_ready"] * 3
    server.wait_ready()
    wait_for(lambda: server.post("/v1/completions", {**body, "max_tokens": 4}, headers=sent["bob"]).status_code == 200)


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
