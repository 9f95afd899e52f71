"""What one client can do to the others: hanging up, names that are not theirs, mixes without end; and what a disk or an engine does."""

import asyncio
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import yaml

from embedft.errors import EngineBusy, ProbesFailed
from serve.access import Record
from serve.errors import RateLimited
from serve.mixes import Mixes
from serve.tenants import Tenant, Tenants, new_key
from serve.visible import Visible
from tests.serve.test_choice import refused
from tests.serve.world import ADMIN, Server, Start, World, put_adapter, wait_for


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


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_client_left_is_counted_as_no_answer_and_no_fault(start: Start, stream: bool) -> None:
    server = start(token_latency=0.05)
    body = {"model": "s", "prompt": "x", "max_tokens": 200, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            next(response.iter_raw())
    else:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.3)

    def counted() -> list[str]:
        return re.findall(r'embedft_requests_total{adapter="s",.*status="(\w+)"} 1.0', server.client.get("/metrics").text)

    wait_for(counted)
    assert counted() == ["cancelled"]


def test_who_waits_too_long_for_a_slot_is_told_so(start: Start) -> None:
    server = start(token_latency=0.05, base={"slots": 1}, limits={"queue_seconds": 0.5})
    body = {"model": "s", "prompt": "x", "stream": True, "max_tokens": 200}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        chunks = response.iter_raw()
        next(chunks)
        began = time.perf_counter()
        refused(server.post("/v1/completions", {"model": "t", "prompt": "x"}), 503, "queue_full")
        assert time.perf_counter() - began < 5


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
    assert answer.json()["error"]["message"] == "adapter 't' is not served: not loaded: PUT it to serve it"


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


def test_a_mix_that_nobody_asks_for_any_more_goes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    live, gone = dict[str, Any](), list[str]()

    async def make(_: Mixes, name: str, members: Any) -> None:
        live[name] = SimpleNamespace(loaded=True)

    async def delete(name: str) -> None:
        gone.append(name)
        del live[name]

    async def run() -> None:
        mixes = Mixes(cast("Any", SimpleNamespace(live=live, delete=delete)), cast("Any", None), cast("Any", None), quota=2, seconds=0.5)
        member: Any = SimpleNamespace(id="a@1", name="a", passport=passport, engine=engine)
        name, began = "", 0.0
        for _ in range(10):  # as long as it is asked for, it stays
            name, began = await mixes.name_of([(member, 0.5)], "anna"), time.monotonic()
            assert (mixes.owned(name, "anna"), mixes.owned(name, "bert")) == (True, False)
            await asyncio.sleep(0.1)
        assert not gone
        while not gone:
            assert time.monotonic() - began < 10
            await asyncio.sleep(0.02)
        assert (gone, live, mixes.owned(name, "anna")) == ([name], {}, False)
        assert time.monotonic() - began >= 0.45

    passport = SimpleNamespace(**dict.fromkeys(("task", "side", "prompts", "pooling", "normalize", "max_length", "template_hash")), r=1)
    engine = SimpleNamespace(config=SimpleNamespace(max_lora_rank=64))
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
