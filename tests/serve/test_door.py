"""Who is let in, what their bodies may hold, and what is written down of it: the app in this process, over no engine."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from embedft.errors import EngineBusy, EngineFailed
from serve.access import AccessLog
from serve.app import create_app
from serve.config import ServerConfig
from serve.errors import EngineRejected, RateLimited, headers_of, status_of
from serve.gateway import Gateway
from serve.proxy import EngineClient
from serve.tenants import new_key
from tests.serve.test_choice import refused

KEY, DIGEST = new_key()
TENANTS = [{"tenant": "root", "key_sha256": DIGEST, "admin": True}]
JSON = {"content-type": "application/json"}


@asynccontextmanager
async def app_of(store: Path, lines: list[str] | None = None, **config: Any) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of a server that has started and serves nothing; `lines` are those of its log."""
    bases = [{"name": "texts", "model": "x", "task": "embedding"}]
    gateway = Gateway(ServerConfig.model_validate({"bases": bases, "adapters": store, **config}))
    gateway.started = True
    app = create_app(gateway)
    logged = next(middleware for middleware in app.user_middleware if middleware.cls is AccessLog)
    logged.kwargs["write"] = (lines if lines is not None else []).append
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=JSON) as client:
        yield client
    await gateway.stop()


def body(size: int) -> bytes:
    """JSON of so many bytes that is read, and then refused."""
    start = b'{"input": "x", "nix": 1'
    return start + b" " * (size - len(start) - 1) + b"}"


def test_what_was_answered_is_held_no_longer_and_what_comes_is_counted(tmp_path: Path) -> None:
    async def run() -> None:
        whole = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield body(800)[:-1]
            await whole.wait()
            yield b"}"

        async with app_of(tmp_path, limits={"held_bytes": 1000}) as client:
            for _ in range(4):
                refused(await client.post("/v1/embeddings", content=body(600)), 400, "unknown_parameter")
            slow = asyncio.create_task(client.post("/v1/embeddings", content=slowly()))
            await asyncio.sleep(0.05)
            over = await client.post("/v1/embeddings", content=body(600))
            refused(over, 429, "bytes_limit_exceeded")
            assert over.headers["retry-after"]
            whole.set()
            refused(await slow, 400, "unknown_parameter")
            refused(await client.post("/v1/embeddings", content=body(600)), 400, "unknown_parameter")

    asyncio.run(run())


def test_a_body_may_have_as_many_bytes_as_it_may(tmp_path: Path) -> None:
    async def run() -> None:
        async with app_of(tmp_path, limits={"body_bytes": 100}) as client:
            refused(await client.post("/v1/embeddings", content=body(100)), 400, "unknown_parameter")
            refused(await client.post("/v1/embeddings", content=body(101)), 413, "body_too_large")

    asyncio.run(run())


def test_a_request_names_one_host(tmp_path: Path) -> None:
    async def run() -> None:
        async with app_of(tmp_path) as client:
            for hosts in (["localhost", "localhost"], ["localhost", "evil.example"]):
                refused(await client.get("/v1/models", headers=[("host", host) for host in hosts]), 400, "host_refused")

    asyncio.run(run())


def test_with_keys_a_page_of_any_origin_may_ask_and_hosts_are_limited_where_they_are_named(tmp_path: Path) -> None:
    async def run() -> None:
        sent = {"authorization": f"Bearer {KEY}", "origin": "https://app.example"}
        async with app_of(tmp_path, tenants=TENANTS) as client:
            assert (await client.get("/v1/models", headers={**sent, "host": "any.example"})).status_code == 200
        async with app_of(tmp_path, tenants=TENANTS, allowed_hosts=["models.example"]) as client:
            for host in ("models.example", "MODELS.example:8000", "localhost", "[::1]:8000"):
                assert (await client.get("/v1/models", headers={**sent, "host": host})).status_code == 200
            refused(await client.get("/v1/models", headers={**sent, "host": "other.example"}), 400, "host_refused")

    asyncio.run(run())


def test_a_body_is_in_the_log_where_that_was_asked_for_and_nowhere_else(tmp_path: Path) -> None:
    async def run(*, texts: bool) -> dict[str, Any]:
        lines: list[str] = []
        async with app_of(tmp_path, lines, log_texts=texts) as client:
            await client.post("/v1/embeddings", content=b'{"nix": "secret"}')
            await asyncio.sleep(0)
        return json.loads(lines[0])

    assert asyncio.run(run(texts=True))["body"] == '{"nix": "secret"}'
    assert "body" not in asyncio.run(run(texts=False))


def test_a_request_keeps_its_own_id_where_that_is_harmless(tmp_path: Path) -> None:
    async def run() -> None:
        async with app_of(tmp_path) as client:
            for given, kept in (("a.b-c_1", True), ("a b", False), ("x" * 65, False), ("", False), ("a;b", False)):
                answer = await client.get("/v1/models", headers={"x-request-id": given})
                assert (answer.headers["x-request-id"] == given) is kept
                assert answer.headers["x-request-id"]

    asyncio.run(run())


def test_looks_at_how_it_is_are_in_the_log_only_where_they_fail() -> None:
    async def run(status: int, path: str) -> list[str]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def nothing(*_: Any) -> Any:
            return

        lines: list[str] = []
        await AccessLog(app, lines.append)({"type": "http", "method": "GET", "path": path, "headers": []}, nothing, nothing)
        await asyncio.sleep(0)
        return lines

    assert [len(asyncio.run(run(*asked))) for asked in ((200, "/ready"), (503, "/ready"), (200, "/v1/models"))] == [0, 1, 1]


def test_refusals_are_counted_by_their_code(tmp_path: Path) -> None:
    async def run() -> str:
        async with app_of(tmp_path) as client:
            for _ in range(2):
                await client.post("/v1/embeddings", content=body(30))
            await client.post("/v1/embeddings", content=b"{")
            return (await client.get("/metrics")).text

    counted = asyncio.run(run())
    assert 'embedft_refusals_total{code="unknown_parameter"} 2.0' in counted
    assert 'embedft_refusals_total{code="json_invalid"} 1.0' in counted


@pytest.mark.parametrize(("wait", "told"), [(0.0, "1"), (0.2, "1"), (1.2, "2"), (30.0, "30")])
def test_who_comes_back_when_told_does_not_come_too_early(wait: float, told: str) -> None:
    assert headers_of(RateLimited("requests", "", wait)) == {"retry-after": told}


@pytest.mark.parametrize(
    ("answered", "error", "status"),
    [(400, EngineRejected, 400), (413, EngineRejected, 400), (429, EngineBusy, 503), (503, EngineBusy, 503), (500, EngineFailed, 502)],
)
def test_what_an_engine_answers_is_told_as_what_it_is_to_a_client(
    tmp_path: Path, answered: int, error: type[Exception], status: int
) -> None:
    with pytest.raises(error) as told:
        EngineClient("words", tmp_path / "s", "key")._check(answered, b"{}")  # pyright: ignore[reportPrivateUsage]
    assert type(told.value) is error
    assert status_of(told.value) == status  # pyright: ignore[reportArgumentType]
