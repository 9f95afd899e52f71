"""No process outlives the server; a killed engine comes back with its adapters; SIGTERM finishes what runs."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from serve.errors import NotReady
from serve.guard import __file__ as guard_file
from serve.supervisor import Command, Supervisor
from tests.serve.test_choice import refused
from tests.serve.world import Server, Start, World, launch, put_adapter, wait_for


def gone(processes: list[psutil.Process]) -> bool:
    return not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def running(server: Server, task: str) -> int:
    """The pid of the engine that does `task` now."""
    return [row["pid"] for row in server.events("start") if row["task"] == task][-1]


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGHUP], ids=["told to end", "its terminal closed"])
def test_a_signal_finishes_what_runs_and_leaves_no_process(start: Start, told: signal.Signals) -> None:
    server = start(token_latency=0.1)
    processes, answers = server.processes(), list[str]()
    assert len(processes) >= 4

    def ask(stream: bool) -> None:
        body = {"model": "s", "prompt": "x", "max_tokens": 15, "stream": stream}
        answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).text)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.client.get("/v1/adapters/s").json()["leases"] == 2)
    server.process.send_signal(told)
    time.sleep(0.3)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")
    for thread in threads:
        thread.join()
    assert all(answer.count(" word") == 14 for answer in answers), answers
    assert server.process.wait(timeout=20) == 0
    wait_for(lambda: gone(processes), 5)


def test_a_killed_gateway_leaves_no_process_and_the_next_serves_what_was_put(world: World, start: Start) -> None:
    server = start()
    assert server.put("copy", {"source": "a"}).status_code == 200
    processes = server.processes()
    assert len(processes) >= 4
    server.process.kill()
    server.process.wait()
    wait_for(lambda: gone(processes), 10)
    again = start()
    assert again.client.get("/v1/adapters/copy").json()["generation"] == world.store.current("a")


def test_a_gateway_told_to_stop_while_starting_leaves_no_process(start: Start) -> None:
    server = start(wait=False)
    wait_for(lambda: len(server.processes()) >= 2, 30, server)
    processes = server.processes()
    refused(server.post("/v1/embeddings", {"input": "x"}), 503, "engine_not_ready")
    assert server.client.get("/ready").status_code == 503
    assert server.stop() == 0
    wait_for(lambda: gone(processes), 10)


def test_a_killed_engine_comes_back_with_its_adapters(changing_world: World, changing: Server) -> None:
    world, server = changing_world, changing
    put_adapter(world.store, "a", world.texts, seed=40)
    assert server.put("a").status_code == 200
    serving = {row["name"]: row["id"] for row in server.client.get("/v1/adapters").json()["data"] if row["state"] == "serving"}
    pid = running(server, "embedding")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: server.client.get("/ready").status_code == 503, 10, server)
    statuses: list[int] = []

    def asked() -> bool:
        response = server.post("/v1/embeddings", {"input": "x", "model": "a"})
        statuses.append(response.status_code)
        if response.status_code == 503:
            assert response.headers["retry-after"]
            assert server.post("/v1/completions", {"model": "s", "prompt": "x"}).status_code == 200  # the other engine goes on
        return response.status_code == 200

    wait_for(asked, 30, server)
    assert set(statuses) == {200, 503}
    assert server.client.get("/ready").status_code == 200
    again = {row["name"]: row["id"] for row in server.client.get("/v1/adapters").json()["data"] if row["state"] == "serving"}
    assert again == serving
    assert 'embedft_engine_restarts{base="texts"} 1.0' in server.client.get("/metrics").text


def test_a_killed_engine_comes_back_without_an_adapter_whose_files_were_changed(world: World, start: Start) -> None:
    server = start()
    path = world.store.folder("a") / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # too little for any probe
    path.write_bytes(content)
    os.kill(running(server, "embedding"), signal.SIGKILL)
    wait_for(lambda: server.client.get("/ready").status_code == 503, 10, server)
    server.wait_ready()
    answer = server.post("/v1/embeddings", {"input": "x", "model": "a"})
    refused(answer, 404, "model_not_found")
    assert "changed or is damaged" in answer.text
    assert server.post("/v1/embeddings", {"input": "x", "model": "b"}).status_code == 200


def killed_under_an_embedding(server: Server, *, after: float) -> httpx.Response:
    """The answer to a request that the engine was working at when it was killed, `after` seconds later."""
    before = server.post("/v1/embeddings", {"input": "x", "model": "a"})
    assert before.status_code == 200
    pid = running(server, "embedding")
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(httpx.post, f"{server.url}/v1/embeddings", json={"input": "x", "model": "a"}, timeout=60)
        wait_for(lambda: server.client.get("/v1/adapters/a").json()["leases"] == 1)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        answer = future.result()
    assert answer.status_code != 200 or answer.json()["data"] == before.json()["data"]
    return answer


def test_an_embedding_whose_engine_dies_under_it_is_asked_again_once_it_is_back(start: Start) -> None:
    server = start(base={"slots": 1})  # the one slot is its own: no other adapter may wait for it while the engine comes back
    answer = killed_under_an_embedding(server, after=0.2)
    assert answer.status_code == 200, answer.text
    assert 'embedft_engine_retries{base="texts"} 1.0' in server.client.get("/metrics").text
    assert server.post("/v1/embeddings", {"input": "x", "model": "b"}).status_code == 200


def test_a_request_is_not_asked_again_when_its_time_is_over(start: Start) -> None:
    server = start(limits={"queue_seconds": 0.4})
    refused(killed_under_an_embedding(server, after=0.5), 503, "engine_not_ready")
    server.wait_ready()
    assert 'embedft_engine_retries{base="texts"} 0.0' in server.client.get("/metrics").text


def test_what_is_pinned_comes_back_first(start: Start) -> None:
    server = start(base={"slots": 2})
    assert server.put("b", {"pin": True}).status_code == 200
    for name in ("b", "a", "q", "a"):  # it is used before the others
        assert server.post("/v1/embeddings", {"input": "x", "model": name, "input_type": "query"}).status_code == 200
    os.kill(running(server, "embedding"), signal.SIGKILL)
    wait_for(lambda: server.client.get("/ready").status_code == 503, 10, server)
    server.wait_ready()
    assert {name: server.client.get(f"/v1/adapters/{name}").json()["loaded"] for name in "abq"} == {"a": True, "b": True, "q": False}


def test_a_request_that_waited_for_an_adapter_while_it_was_replaced_leaves_nothing_in_the_engine(world: World, start: Start) -> None:
    """`a` is out when its replacement begins; a request asks for it, and gets its turn when the old one has drained."""
    server, old = start(base={"slots": 2}, latency=0.2), world.store.current("a")
    new = put_adapter(world.store, "a", world.texts, seed=60)
    for name in ("b", "q"):
        assert server.post("/v1/embeddings", {"input": "x", "model": name, "input_type": "query"}).status_code == 200
    with ThreadPoolExecutor(2) as pool:
        putting = pool.submit(server.put, "a", {"source": new})
        time.sleep(0.3)
        asked = pool.submit(server.post, "/v1/embeddings", {"input": "x", "model": "a"})
        assert putting.result().status_code == 200, putting.result().text
        assert asked.result().status_code == 200, asked.result().text
    back = server.put("a", {"source": old})
    assert back.status_code == 200, back.text


def test_an_engine_killed_in_mid_stream_ends_the_stream_with_an_error(changing: Server) -> None:
    server = changing
    body = {"model": "s", "prompt": "x", "stream": True, "max_tokens": 2000}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        chunks = response.iter_raw()
        next(chunks)
        os.kill(running(server, "causal_lm"), signal.SIGKILL)
        rest = b"".join(chunks).decode()
    last = json.loads(rest.strip().split("\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_not_ready"
    assert "[DONE]" not in rest
    server.wait_ready()
    assert 'embedft_requests_total{adapter="s",base="words",route="completions",status="error"} 1.0' in server.client.get("/metrics").text
    line = server.logged(response.headers["x-request-id"])
    assert (line["status"], line["ended"]) == (200, "error")


def test_an_engine_that_cannot_start_ends_the_server_with_its_log(world: World) -> None:
    with pytest.raises(AssertionError, match=r"(?s)the server ended.*could not convert string to float"):
        world.start(latency="nonsense")


def test_an_engine_that_lives_and_answers_no_more_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.supervisor.PULSE", 0.05)
    monkeypatch.setattr("serve.supervisor.HUNG", 0.5)
    answers = True

    async def healthy() -> bool:
        return answers

    async def prepare() -> None:
        return

    async def run() -> None:
        nonlocal answers
        command = Command([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "socket", tmp_path / "log")
        engine = Supervisor("words", command, healthy=healthy, prepare=prepare, start_seconds=20, stop_seconds=0.1)
        await engine.start()
        await asyncio.sleep(1)
        assert (engine.state, engine.restarts) == ("ready", 0)
        answers = False
        async with asyncio.timeout(20):
            while not engine.restarts:
                await asyncio.sleep(0.05)
            with pytest.raises(NotReady):
                engine.require_ready()
            answers = True
            assert await engine.back(time.monotonic() + 20)
        await engine.stop()

    asyncio.run(run())


def test_the_guard_ends_grandchildren_that_left_their_group(tmp_path: Path) -> None:
    marker = tmp_path / "pids"
    child = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open({str(marker)!r}, "a") as file: file.write(f"{{os.getpid()}}\\n")
time.sleep(600)
"""
    read, write = os.pipe()
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    command = [sys.executable, "-I", "-S", guard_file, str(read), "0.3", str(sockets), sys.executable, "-c", child]
    guard = subprocess.Popen(command, pass_fds=(read,))
    os.close(read)
    wait_for(lambda: marker.exists() and len(marker.read_text().split()) == 2)
    processes = [psutil.Process(int(line)) for line in marker.read_text().split()]
    os.close(write)
    assert guard.wait(timeout=10) == 128 + signal.SIGKILL
    assert not sockets.exists()
    wait_for(lambda: gone(processes), 5)


def test_the_guard_lets_an_engine_finish_and_keeps_the_folder_of_a_gateway_that_lives(tmp_path: Path) -> None:
    begun, finished = tmp_path / "begun", tmp_path / "finished"
    script = f"trap 'sleep 0.5; touch {finished}; exit 0' TERM; touch {begun}; while true; do sleep 0.05; done"
    read, write = os.pipe()
    command = [sys.executable, "-I", "-S", guard_file, str(read), "10", str(tmp_path), "sh", "-c", script]
    guard = subprocess.Popen(command, pass_fds=(read,))
    os.close(read)
    wait_for(begun.exists)
    guard.terminate()
    assert guard.wait(timeout=10) == 0
    os.close(write)
    assert finished.exists()


def test_a_base_that_is_served_twice_has_each_adapter_once_and_by_its_task(world: World) -> None:
    ways = {"first": "embedding", "second": "embedding", "third": "causal_lm"}
    bases = [{"name": name, "model": str(world.texts), "task": task, "engine": "fake"} for name, task in ways.items()]
    events = {"EMBEDFT_FAKE_EVENTS": str(world.folder / "events.jsonl")}
    server = launch({"bases": bases, "stop_seconds": 3.0}, folder=world.folder, store=world.store.root, env=events)
    try:
        server.wait_ready()
        rows = [row for row in server.client.get("/v1/adapters").json()["data"] if row["state"] == "serving"]
        assert [(row["name"], row["base"], row.get("refused")) for row in rows] == [(name, "first", None) for name in "abq"]
        assert len(server.events("load")) == 3
    finally:
        server.stop()
