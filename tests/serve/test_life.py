"""More adapters than slots, pinned generations, aliases, a disk that fails: one server with three slots a base."""

import os
import random
import resource
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest

from serve.aliases import Aliases
from tests.serve.test_choice import expected, refused, rows
from tests.serve.world import ADMIN, Server, World, fill_adapter, make_world, put_adapter, wait_for
from tests.timing import assert_faster

SLOTS = 3
NAMES = [f"x{number}" for number in range(2 * SLOTS)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("life"))
    for name in ("a", "b", "q"):
        made.store.remove(name)
    for number, name in enumerate(NAMES):
        put_adapter(made.store, name, made.texts, seed=100 + number)
    return made


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Server]:
    running = world.start(token_latency=0.005, base={"slots": SLOTS})
    yield running
    running.stop()


def ask(server: Server, name: str, text: str = "hello") -> httpx.Response:
    return server.post("/v1/embeddings", {"input": text, "adapter": name})


def loaded_at_most(server: Server) -> int:
    """The most adapters that one engine ever held, by what the engines wrote down."""
    held: Counter[int] = Counter()
    most = 0
    for row in server.events():
        held[row["pid"]] += {"load": 1, "unload": -1}.get(row["event"], 0)
        most = max(most, *held.values())
    return most


def test_twice_the_slots_are_served_right_without_starving_anyone(server: Server, world: World) -> None:
    def timed(names: list[str], count: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in names}

        def one(seed: int) -> None:
            choice = random.Random(seed)
            with httpx.Client(base_url=server.url, timeout=30) as client:
                for number in range(count):
                    name, text = choice.choice(names), f"text {seed} {number}"
                    began = time.perf_counter()
                    answer = client.post("/v1/embeddings", json={"input": text, "adapter": name})
                    times[name].append(time.perf_counter() - began)
                    assert answer.headers["x-embedft-adapter"].startswith(f"{name}@")
                    np.testing.assert_allclose(rows(answer)[0], expected(world, name, text), atol=1e-6)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, range(4)))
        return times

    def measure() -> tuple[float, float]:
        inside = timed(NAMES[:SLOTS], 40)
        beyond = timed(NAMES, 60)
        medians = [statistics.median([one for part in times.values() for one in part]) for times in (inside, beyond)]
        assert all(beyond.values())
        assert max(one for part in beyond.values() for one in part) < 5
        return medians[1], 3 * medians[0] + 0.005

    assert_faster(measure)
    assert loaded_at_most(server) == SLOTS
    assert "embedft_adapter_evictions" in server.client.get("/metrics").text


def test_an_adapter_in_use_is_never_evicted(server: Server, world: World) -> None:
    for number in range(SLOTS):
        put_adapter(world.store, f"w{number}", world.words, seed=200 + number, task="causal_lm")
        assert server.put(f"w{number}").status_code == 200
    body = {"model": "w0", "prompt": "x", "stream": True, "max_tokens": 200}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        chunks = response.iter_raw()
        next(chunks)
        start = len(server.events())
        for name in ("s", "t", "w1", "w2", "s"):
            assert server.post("/v1/completions", {"model": name, "prompt": "x", "max_tokens": 1}).status_code == 200
        gone = [row["adapter"] for row in server.events()[start:] if row["event"] == "unload"]
        assert gone
        assert not [name for name in gone if name.startswith("w0@")]
        assert b"[DONE]" in b"".join(chunks)


def test_a_pinned_adapter_stays_and_pins_cannot_take_every_slot_unsaid(server: Server) -> None:
    for name in NAMES[1:]:
        assert ask(server, name).status_code == 200
    assert server.client.get("/v1/adapters/x0").json()["loaded"] is False
    pinned = server.put("x0", {"pin": True}).json()
    assert (pinned["pinned"], pinned["loaded"]) == (True, True)
    for name in NAMES[1:]:
        assert ask(server, name).status_code == 200
    assert server.client.get("/v1/adapters/x0").json()["loaded"] is True
    for name in ("x1", "x2"):
        assert ask(server, name).status_code == 200
        assert server.put(name, {"pin": True}).status_code == 200
    refused(ask(server, "x3"), 503, "slots_pinned")
    for name in ("x0", "x1", "x2"):
        assert server.put(name, {"pin": False}).status_code == 200
    assert ask(server, "x3").status_code == 200


def test_a_pinned_name_stays_pinned_when_it_moves_to_a_new_generation(server: Server, world: World) -> None:
    first = put_adapter(world.store, "held", world.texts, seed=140)
    assert server.put("held", {"pin": True}).json()["pinned"] is True
    assert put_adapter(world.store, "held", world.texts, seed=141) != first
    moved = server.put("held").json()
    assert (moved["pinned"], moved["generation"] != first) == (True, True)
    assert server.put("held").json()["pinned"] is True
    assert server.put("held", {"pin": False}).json()["pinned"] is False
    assert server.put("held").json()["pinned"] is False
    assert server.client.delete("/v1/adapters/held", headers=ADMIN).status_code == 200


def test_a_pinned_adapter_that_is_deleted_leaves_its_slot(server: Server, world: World) -> None:
    for number in range(SLOTS + 1):
        name = f"pin{number}"
        put_adapter(world.store, name, world.texts, seed=150 + number)
        assert server.put(name, {"pin": True}).status_code == 200
        assert server.client.delete(f"/v1/adapters/{name}", headers=ADMIN).status_code == 200
    assert ask(server, "x0").status_code == 200


def test_an_adapter_whose_files_were_changed_is_not_loaded_again(server: Server, world: World) -> None:
    generation = put_adapter(world.store, "changed", world.texts, seed=401)
    assert server.put("changed").status_code == 200
    for name in NAMES:
        assert ask(server, name).status_code == 200
    weights = world.store.folder(generation) / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(ask(server, "changed"), 503, "adapter_unavailable")
    weights.write_bytes(content)
    assert ask(server, "changed").status_code == 200


def test_one_request_for_more_adapters_than_slots_is_refused_at_once_and_holds_nothing(server: Server) -> None:
    names = NAMES[: SLOTS + 1]
    began = time.perf_counter()
    refused(server.post("/v1/embeddings", {"input": ["t"] * len(names), "adapter": names}), 400, "too_many_adapters")
    assert time.perf_counter() - began < 2
    assert ask(server, NAMES[-1]).status_code == 200


def test_requests_for_several_adapters_at_once_never_wait_for_each_other(server: Server, world: World) -> None:
    def one(seed: int) -> None:
        choice = random.Random(seed)
        with httpx.Client(base_url=server.url, timeout=20) as client:
            for _ in range(6):
                names = choice.sample(NAMES, SLOTS)
                answer = client.post("/v1/embeddings", json={"input": ["t"] * SLOTS, "adapter": names})
                assert answer.status_code == 200, answer.text
                wanted = [expected(world, name, "t") for name in names]
                np.testing.assert_allclose(rows(answer), np.stack(wanted), atol=1e-6)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))


def test_a_request_may_pin_an_earlier_generation(server: Server, world: World) -> None:
    old = world.store.current("x5")
    new = put_adapter(world.store, "x5", world.texts, seed=300)
    assert server.put("x5").json()["generation"] == new
    answer = ask(server, f"x5@{old[:12]}")
    assert answer.headers["x-embedft-adapter"] == f"x5@{old[:12]}"
    assert not np.allclose(rows(answer), rows(ask(server, "x5")))
    listed = server.client.get("/v1/adapters").json()["data"]
    assert {row["generation"]: row["state"] for row in listed if row["name"] == "x5"} == {old: "earlier", new: "serving"}
    assert server.client.get(f"/v1/adapters/x5@{old[:12]}").json()["state"] == "earlier"
    metrics = server.client.get("/metrics").text
    for name, generation in (("x5", new), (f"x5@{old[:12]}", old)):
        assert f'embedft_adapter_loaded{{adapter="{name}",base="texts"}} 1.0' in metrics
        assert f'embedft_adapter_resident{{adapter="x5",base="texts",generation="{generation[:12]}"}} 1.0' in metrics
    assert ask(server, "x5").headers["x-embedft-adapter"] == f"x5@{new[:12]}"
    for wrong in (f"x4@{old[:12]}", "x5@" + "0" * 12, f"x5@{old[:11]}", f"nix@{old[:12]}", "x5@../..", f"x5@{old[:12]}@{old[:12]}"):
        refused(ask(server, wrong), 404, "adapter_not_found")
    back = server.put("x5", {"source": old})  # a rollback: one call
    assert back.json()["generation"] == old
    assert ask(server, "x5").headers["x-embedft-adapter"] == f"x5@{old[:12]}"


def test_an_adapter_whose_files_vanish_is_a_503_and_the_others_go_on(server: Server, world: World) -> None:
    generation = put_adapter(world.store, "lost", world.texts, seed=400)
    assert server.put("lost").status_code == 200
    for name in NAMES:
        assert ask(server, name).status_code == 200
    away = world.folder / "away"
    shutil.move(world.store.folder(generation), away)
    refused(ask(server, "lost"), 503, "adapter_unavailable")
    assert ask(server, "x1").status_code == 200
    shutil.move(away, world.store.root / "objects" / generation)
    assert ask(server, "lost").status_code == 200


def test_an_alias_splits_traffic_by_its_shares_and_sticks_to_a_key(server: Server, world: World) -> None:
    old = world.store.current("x0")
    variants = {"x0": 75, "x1": 25}
    assert server.client.put("/v1/aliases/live", json={"variants": variants}, headers=ADMIN).status_code == 200
    assert server.client.get("/v1/aliases").json()["data"] == {"live": variants}

    def made_by(key: str | None) -> str:
        headers = {"x-embedft-sticky": key} if key else {}
        body = {"input": "x", "model": "live"}
        return server.post("/v1/embeddings", body, headers=headers).headers["x-embedft-adapter"].partition("@")[0]

    drawn = Counter(made_by(str(number)) for number in range(200))
    assert 125 < drawn["x0"] < 175
    assert drawn["x0"] + drawn["x1"] == 200
    assert {made_by("someone") for _ in range(8)} == {made_by("someone")}
    assert {made_by(None) for _ in range(40)} == {"x0", "x1"}
    text = server.client.get("/metrics").text
    assert all(f'embedft_requests_total{{adapter="{name}",base="texts"' in text for name in variants)
    assert Aliases(world.store.root).all == {"live": variants}
    assert server.client.put("/v1/aliases/live", json={"variants": {f"x0@{old[:12]}": 1}}, headers=ADMIN).status_code == 200
    assert made_by("someone") == "x0"
    refused(server.client.put("/v1/aliases/x0", json={"variants": variants}, headers=ADMIN), 422, "adapter_invalid")
    refused(server.client.put("/v1/aliases/y", json={"variants": {"nix": 1}}, headers=ADMIN), 404, "adapter_not_found")
    refused(server.put("live", {"source": "x0"}), 422, "adapter_invalid")
    assert server.client.delete("/v1/aliases/live", headers=ADMIN).status_code == 200
    refused(ask(server, "live"), 404, "adapter_not_found")


def test_an_alias_names_the_variant_that_is_not_served(server: Server, world: World) -> None:
    put_adapter(world.store, "going", world.texts, seed=130)
    assert server.put("going").status_code == 200
    assert server.client.put("/v1/aliases/onward", json={"variants": {"going": 1}}, headers=ADMIN).status_code == 200
    assert server.client.delete("/v1/adapters/going", headers=ADMIN).status_code == 200
    answer = ask(server, "onward")
    refused(answer, 404, "adapter_not_found")
    assert answer.json()["error"]["message"].startswith("adapter 'going' is not served: ")
    refused(server.client.put("/v1/aliases/going", json={"variants": {"x0": 1}}, headers=ADMIN), 422, "adapter_invalid")
    assert server.client.delete("/v1/aliases/onward", headers=ADMIN).status_code == 200


def test_what_a_server_serves_without_a_name_is_not_collected_beside_it(server: Server, world: World) -> None:
    put_adapter(world.store, "passing", world.texts, seed=131)
    assert server.put("passing").status_code == 200
    world.store.remove("passing")
    assert world.store.collect() == []
    assert ask(server, "passing").status_code == 200


def test_a_full_disk_is_said_and_what_serves_goes_on(server: Server, world: World) -> None:
    process = psutil.Process(server.process.pid)
    before = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        refused(server.client.put("/v1/aliases/full", json={"variants": {"x0": 1}}, headers=ADMIN), 507, "storage_failed")
        for name in NAMES:
            assert ask(server, name).status_code == 200
    finally:
        process.rlimit(resource.RLIMIT_FSIZE, before)
    assert server.client.get("/v1/aliases").json()["data"] == {}
    assert not [path for path in world.store.root.iterdir() if path.name.startswith(".aliases")]


def test_a_vanished_store_is_said_and_what_is_loaded_goes_on(server: Server, world: World) -> None:
    assert ask(server, "x0").status_code == 200
    away = world.folder / "away"
    world.store.root.rename(away)
    try:
        assert ask(server, "x0").status_code == 200
        names = {row["name"] for row in server.client.get("/v1/adapters").json()["data"]}
        assert set(NAMES) <= names
        refused(server.put("x0", {"source": "nix"}), 400, "source_refused")
        refused(server.put("new"), 404, "adapter_not_found")
    finally:
        if world.store.root.exists():
            shutil.rmtree(world.store.root)
        away.rename(world.store.root)
    for name in NAMES:
        assert ask(server, name).status_code == 200


def test_a_half_written_adapter_is_neither_listed_nor_served(server: Server, world: World) -> None:
    half = world.store.root / "objects" / ".stage-left"
    half.mkdir()
    (half / "adapter_config.json").write_text('{"peft_type": "LO')
    assert "stage" not in server.client.get("/v1/adapters").text
    refused(server.put("half", {"source": "objects/.stage-left"}), 400, "source_refused")
    shutil.rmtree(half)


def test_25_bad_loads_in_a_row_disturb_nobody(server: Server, world: World) -> None:
    root, bad = world.store.root, list[tuple[str, str]]()
    for number, kind in enumerate(["pickle", "device", "link", "header", "zip", "foreign", "scaled"]):
        folder = root / f"bad{number}"
        folder.mkdir()
        base = world.words if kind == "foreign" else world.texts
        fill_adapter(folder, "bad", base, seed=500 + number, scale=0.5 if kind == "scaled" else 1.0, task="embedding")
        weights = folder / "adapter_model.safetensors"
        if kind == "pickle":
            (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
        elif kind == "device":
            os.mkfifo(folder / "pipe")
        elif kind == "link":
            (folder / "more").symlink_to("/etc")
        elif kind == "header":
            weights.write_bytes((10 << 30).to_bytes(8, "little") + b"{}")
        elif kind == "zip":
            weights.write_bytes(b"PK\x03\x04" + bytes(1000))
        bad.append((f"bad{number}", {"foreign": "base_mismatch", "scaled": "probes_failed"}.get(kind, "adapter_invalid")))
    stop, wrong = threading.Event(), list[str]()

    def traffic() -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not stop.is_set():
                answer = client.post("/v1/embeddings", json={"input": "hello", "adapter": "x0"})
                if answer.status_code != 200 or not np.allclose(rows(answer)[0], steady, atol=1e-6):
                    wrong.append(answer.text)

    steady = rows(ask(server, "x0"))[0]
    thread = threading.Thread(target=traffic)
    thread.start()
    for number in range(25):
        source, code = bad[number % len(bad)]
        answer = server.put("x0", {"source": source})
        assert answer.json()["error"]["code"] == code, (source, answer.text)
    stop.set()
    thread.join()
    assert not wrong
    wait_for(lambda: server.client.get("/ready").status_code == 200)
