"""What one request may hold: bodies that cost more than they bring are refused, and nobody else waits for them."""

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from embedft.errors import InputInvalid
from serve.body import DEEPEST, WIDEST, parse
from serve.config import Limits, ServerConfig
from serve.door import Door, Held
from serve.engines.command import engine_command
from serve.engines.peft import bodies
from serve.engines.peft.generation import room_for
from serve.engines.peft.http import INLINE_BYTES, _beside  # pyright: ignore[reportPrivateUsage]
from serve.engines.settings import EngineSettings
from serve.errors import QueueFull, RateLimited
from serve.generation_routes import cost_of
from serve.schemas import ChatRequest, CompletionRequest, EmbeddingRequest, EmbedRequest, RerankRequest
from serve.tenants import Tenant, TenantEntry
from tests.fixtures_embedding import tiny_encoder
from tests.fixtures_lm import tiny_llama
from tests.serve.test_abuse import keys
from tests.serve.test_choice import refused
from tests.serve.world import Server, Start, World, wait_for

MANY = 5000


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
    assert room_for([[1] * 10], None, **asked) == room_for([[1] * 10, [1]], 90, **asked) == 90
    assert room_for([[1] * 99], None, **asked) == 1
    for prompt, wanted in ((10, 91), (100, None)):
        with pytest.raises(InputInvalid, match="exceed the context of 100"):
            room_for([[1] * prompt], wanted, **asked)
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


def test_the_readmes_limits_are_the_defaults() -> None:
    readme = (Path(__file__).parents[2] / "serve" / "README.md").read_text(encoding="utf-8")
    told = yaml.safe_load(readme.partition("```yaml\nlimits:")[2].partition("```")[0].join(("limits:", "")))["limits"]
    assert told.items() <= Limits().model_dump().items()
    assert len(told) > 5


def test_a_long_body_is_tokenised_beside_the_loop() -> None:
    async def where(size: int) -> int:
        return await _beside(b"x" * size, threading.get_ident)

    here = threading.get_ident()
    assert asyncio.run(where(INLINE_BYTES)) == here
    assert asyncio.run(where(INLINE_BYTES + 1)) != here


def test_a_client_that_hangs_up_while_it_sends_is_no_fault_of_the_server(world: World, start: Start) -> None:
    server = start()
    host = server.url.partition("//")[2]
    name, _, port = host.partition(":")
    with socket.create_connection((name, int(port))) as half:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{"
        half.sendall(head.encode())
        time.sleep(0.3)
    wait_for(lambda: '"status": 499' in server.log.read_text())
    assert "Traceback" not in server.log.read_text()


def test_a_malformed_origin_is_refused_as_any_other(shared: Server) -> None:
    refused(shared.client.get("/v1/models", headers={"origin": "http://["}), 403, "origin_refused")
