"""Adapters come and go while requests run: proven before the switch, drained after it, untouched by a refusal.

One server for all; each test has adapters of its own names.
"""

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from embedft.adapters.probes import read_probes, write_probes
from embedft.adapters.store import GENERATION
from serve.engines.fake import text
from serve.lifecycle import KEPT_EARLIER
from tests.serve.test_choice import refused
from tests.serve.world import ADMIN, Server, World, fill_adapter, put_adapter, wait_for


@pytest.fixture
def world(changing_world: World) -> World:
    return changing_world


@pytest.fixture
def server(changing: Server) -> Server:
    return changing


def served(server: Server, world: World, name: str, *, seed: int, scale: float = 1.0, task: str = "embedding") -> str:
    """Put an adapter into the store and, expecting success, into the server; its generation."""
    generation = put_adapter(world.store, name, world.texts if task == "embedding" else world.words, seed=seed, scale=scale, task=task)
    assert server.put(name).status_code == 200
    return generation


def unloaded(server: Server, name: str) -> list[str]:
    return [row["adapter"] for row in server.events("unload") if row["adapter"].startswith(f"{name}@")]


def own(name: str, generation: str) -> str:
    return f"{name}@{generation[:12]}"


def test_hot_replace_under_load_answers_every_request_by_one_of_the_two_generations(world: World, server: Server) -> None:
    first = served(server, world, "hot", seed=99, task="causal_lm")
    stop, wrong, answers = threading.Event(), list[str](), list[str]()

    def ask(number: int) -> None:
        count = 0
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not stop.is_set():
                count += 1
                name, prompt = ("hot", "t", None)[(number + count) % 3], f"{number}-{count}"
                body = {"model": "words", "adapter": name, "prompt": prompt, "max_tokens": 4, "stream": number % 2 == 0}
                response = client.post("/v1/completions", json=body)
                made_by = response.headers.get("x-embedft-adapter", "")
                if (
                    response.status_code != 200
                    or text(made_by, prompt) not in response.text
                    or made_by.partition("@")[0] != (name or "base")
                ):
                    wrong.append(response.text)
                if name == "hot":
                    answers.append(made_by)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    generations = [first]
    until = time.monotonic() + 4
    for seed in range(100, 150):
        generations.append(served(server, world, "hot", seed=seed, task="causal_lm"))
        assert server.post("/v1/completions", {"model": "hot", "prompt": "x"}).headers["x-embedft-adapter"] == own("hot", generations[-1])
        if time.monotonic() > until and len(set(answers)) > 3:
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(answers) <= {own("hot", generation) for generation in generations}
    assert len(set(answers)) > 2
    wait_for(lambda: unloaded(server, "hot") == [own("hot", generation) for generation in generations[:-1]])


def test_a_generation_in_use_is_unloaded_only_after_its_last_answer(world: World, server: Server) -> None:
    old = served(server, world, "slow", seed=49, task="causal_lm")
    body = {"model": "slow", "prompt": "x", "stream": True, "max_tokens": 250}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        chunks = response.iter_raw()
        next(chunks)
        served(server, world, "slow", seed=50, task="causal_lm")
        states = {row["state"] for row in server.client.get("/v1/adapters").json()["data"] if row["name"] == "slow"}
        assert states == {"serving", "draining"}
        assert not unloaded(server, "slow")
        assert b"[DONE]" in b"".join(chunks)
    wait_for(lambda: unloaded(server, "slow") == [own("slow", old)])


def test_what_stands_beside_the_weights_is_read_again_when_an_adapter_is_put_again(world: World, server: Server) -> None:
    def shown() -> dict[str, Any]:
        return server.client.get("/v1/adapters/again").json()

    first = put_adapter(world.store, "again", world.texts, seed=70, metrics={"ndcg@10": 0.5})
    assert server.put("again").json()["metrics"] == {"ndcg@10": 0.5}
    assert put_adapter(world.store, "again", world.texts, seed=70, metrics={"ndcg@10": 0.6}) == first
    assert server.put("again").json()["metrics"] == shown()["metrics"] == {"ndcg@10": 0.6}
    assert not unloaded(server, "again")
    with world.store.stage() as folder:
        fill_adapter(folder, "again", world.texts, seed=70, scale=1.0, task="embedding", metrics={"ndcg@10": 0.7})
        recorded = read_probes(folder)
        write_probes(folder, replace(recorded, effect=tuple(-effect for effect in recorded.effect)))
        assert world.store.put(folder, "again") == first
    refused(server.put("again"), 422, "probes_failed")
    assert shown()["metrics"] == {"ndcg@10": 0.6}


@pytest.mark.parametrize("scale", [0.8, 0.0])
@pytest.mark.parametrize("task", ["embedding", "causal_lm"])
def test_an_adapter_that_fails_its_probes_leaves_the_old_one_serving(world: World, server: Server, scale: float, task: str) -> None:
    name = f"p{int(scale * 10)}-{task}"
    before = served(server, world, name, seed=60, task=task)
    base = world.texts if task == "embedding" else world.words
    damaged = put_adapter(world.store, name, base, seed=61, scale=scale, task=task)
    refused(server.put(name), 422, "probes_failed")
    path, field = ("/v1/embeddings", "input") if task == "embedding" else ("/v1/completions", "prompt")
    answer = server.post(path, {field: "x", "model": name})
    assert answer.headers["x-embedft-adapter"] == own(name, before)
    assert unloaded(server, name) == [own(name, damaged)]  # nothing of the refused one stays in the engine


def test_an_adapter_of_another_base_is_a_409_and_listed_with_the_reason(world: World, server: Server) -> None:
    refused(server.put("foreign"), 409, "base_mismatch")
    for body, code in (({"adapter": "foreign"}, "adapter_not_found"), ({"model": "foreign"}, "model_not_found")):
        answer = server.post("/v1/embeddings", {"input": "x", **body})
        refused(answer, 404, code)
        assert "adapter 'foreign' is not served: " in answer.text
        assert "trained on base" in answer.text
    listed = {row["name"]: row for row in server.client.get("/v1/adapters").json()["data"]}
    assert listed["foreign"]["state"] == listed["broken"]["state"] == "unserved"
    assert "trained on base" in listed["foreign"]["reason"]
    assert f"but here is {world.texts.name} (" in listed["foreign"]["reason"]
    assert "probes" in listed["broken"]["reason"]


def test_at_the_start_a_refused_generation_leaves_the_one_before_it_serving(world: World, server: Server) -> None:
    older, newest = world.store.history("twice")
    (row,) = [row for row in server.client.get("/v1/adapters").json()["data"] if row["name"] == "twice"]
    assert row["generation"] == older
    assert "probes" in row["refused"]
    assert f"{row['id']} is served, and not the newest generation of that name: {row['refused']}\n" in server.log.read_text()
    refused(server.put("twice"), 422, "probes_failed")
    assert world.store.current("twice") == newest


def test_expected_generation_is_compare_and_swap(world: World, server: Server) -> None:
    old = served(server, world, "swap", seed=69)
    new = put_adapter(world.store, "swap", world.texts, seed=70)
    refused(server.put("swap", {"expected_generation": new}), 409, "generation_conflict")
    assert server.put("swap", {"expected_generation": old, "pin": True}).json()["generation"] == new
    back = server.put("swap", {"source": old[:12], "expected_generation": new[:12]})  # a rollback is one call
    assert back.json()["generation"] == old
    assert world.store.current("swap") == old


@pytest.mark.parametrize("source", [None, "store", "checked", "a folder"])
def test_whatever_is_put_must_be_the_generation_that_is_asked_for(world: World, server: Server, source: str | None) -> None:
    serving = served(server, world, "checked", seed=77)
    if source == "a folder":
        (world.store.root / source).mkdir()
        fill_adapter(world.store.root / source, "checked", world.texts, seed=78, scale=1.0, task="embedding")
    body = {} if source is None else {"source": source}
    refused(server.put("checked", {**body, "generation": "0" * 12}), 409, "generation_conflict")
    assert server.client.get("/v1/adapters/checked").json()["generation"] == serving
    if source != "a folder":
        assert server.put("checked", {**body, "generation": serving[:12]}).status_code == 200


def test_the_copy_of_a_folder_that_is_refused_does_not_stay_in_the_store(world: World, server: Server) -> None:
    def objects() -> set[str]:
        return {path.name for path in (world.store.root / "objects").iterdir() if GENERATION.fullmatch(path.name)}

    def put(scale: float) -> httpx.Response:
        folder = world.store.root / f"brought-{scale}"
        folder.mkdir()
        fill_adapter(folder, "brought", world.texts, seed=81, scale=scale, task="embedding")
        return server.put("brought", {"source": folder.name})

    before = objects()
    refused(put(0.5), 422, "probes_failed")
    assert objects() == before
    kept = put(1.0).json()["generation"]
    assert objects() == before | {kept}
    refused(server.put("brought-too", {"source": "brought-1.0", "generation": "0" * 12}), 409, "generation_conflict")
    assert objects() == before | {kept}, "what another name serves stays"


@pytest.mark.parametrize("damage", ["none", "half", "others", "asked"])
def test_a_copy_that_is_refused_leaves_the_stores_own_files_as_they_were(world: World, server: Server, damage: str) -> None:
    name = f"kept-{damage}"
    generation = served(server, world, name, seed=180)
    mine = world.store.folder(name)
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    copy = world.store.root / f"copy-{damage}"
    shutil.copytree(mine, copy)
    if damage == "none":
        (copy / "probes.safetensors").unlink()
    elif damage == "half":
        (copy / "probes.safetensors").write_bytes(before["probes.safetensors"][:50])
    else:
        recorded = read_probes(copy)
        write_probes(copy, replace(recorded, effect=tuple(-effect for effect in recorded.effect)))
    expected = {"generation": "0" * 12} if damage == "asked" else {}
    for other in (name, f"other-{damage}")[: 1 if damage == "others" else 2]:  # under a new name the fake engine does as these probes say
        answer = server.put(other, {"source": copy.name, **expected})
        assert answer.status_code == {"others": 422, "asked": 409}.get(damage, 200), answer.text
        assert {path.name: path.read_bytes() for path in mine.iterdir()} == before
    assert server.client.post(f"/v1/adapters/{name}/verify", headers=ADMIN).json()["probe"]["passed"] is True
    assert world.store.current(name) == generation


def test_a_folder_without_passport_is_told_that_it_wants_a_base(world: World, server: Server) -> None:
    (world.store.root / "by-peft").mkdir()
    answer = server.put("by-peft", {"source": "by-peft"})
    refused(answer, 422, "adapter_invalid")
    assert "name the `base`" in answer.text


def test_a_base_is_not_named_for_what_knows_its_own(world: World, server: Server) -> None:
    generation = served(server, world, "knows", seed=79)
    for source in ({}, {"source": "store"}, {"source": "knows"}, {"source": generation[:12]}):
        refused(server.put("knows", {**source, "base": "words"}), 400, "invalid_parameter")


def test_delete_drains_and_unloads_and_put_brings_it_back(world: World, server: Server) -> None:
    served(server, world, "off", seed=71)
    assert 'embedft_adapter_resident{adapter="off"' in server.client.get("/metrics").text
    assert server.client.delete("/v1/adapters/off", headers=ADMIN).status_code == 200
    answer = server.post("/v1/embeddings", {"input": "x", "adapter": "off"})
    refused(answer, 404, "adapter_not_found")
    assert "PUT it to serve it" in answer.text
    refused(server.client.delete("/v1/adapters/off", headers=ADMIN), 404, "adapter_not_found")
    wait_for(lambda: len(unloaded(server, "off")) == 1)
    assert server.client.get("/v1/adapters/off").json()["state"] == "unserved"
    assert 'embedft_adapter_resident{adapter="off"' not in server.client.get("/metrics").text
    assert server.put("off").status_code == 200
    assert server.post("/v1/embeddings", {"input": "x", "adapter": "off"}).status_code == 200
    assert server.client.post("/v1/adapters/off/verify", headers=ADMIN).json()["probe"]["passed"] is True


def test_an_earlier_generation_of_another_base_is_asked_at_its_own(world: World, server: Server) -> None:
    wrote = served(server, world, "moved", seed=170, task="causal_lm")
    served(server, world, "moved", seed=171)
    named = f"moved@{wrote[:12]}"
    assert server.client.get(f"/v1/adapters/{named}").json()["base"] == "words"
    answer = server.post("/v1/completions", {"model": named, "prompt": "x", "max_tokens": 2})
    assert (answer.status_code, answer.headers["x-embedft-adapter"]) == (200, named), answer.text
    refused(server.post("/v1/embeddings", {"model": named, "input": "x"}), 400, "wrong_task")
    assert server.post("/v1/embeddings", {"model": "moved", "input": "x"}).status_code == 200


def test_of_earlier_generations_that_were_asked_for_only_the_last_few_stay_loaded(world: World, server: Server) -> None:
    generations = [served(server, world, "many", seed=200 + number) for number in range(KEPT_EARLIER + 3)]
    wait_for(lambda: len(unloaded(server, "many")) == len(generations) - 1)
    for generation in generations[:-1]:
        for _ in range(2):
            answer = server.post("/v1/embeddings", {"input": "x", "adapter": own("many", generation)})
            assert answer.headers["x-embedft-adapter"] == own("many", generation)
    wait_for(lambda: unloaded(server, "many")[len(generations) - 1 :] == [own("many", one) for one in generations[:2]])
    assert f'embedft_requests_total{{adapter="{own("many", generations[0])}"' in server.client.get("/metrics").text


def test_an_earlier_generation_that_fails_its_probes_is_not_gone_back_to(world: World, server: Server) -> None:
    old, new = (served(server, world, "back", seed=seed) for seed in (75, 76))
    wait_for(lambda: unloaded(server, "back") == [own("back", old)])
    assert server.post("/v1/embeddings", {"input": "x", "adapter": own("back", old)}).status_code == 200
    with world.store.stage() as folder:
        fill_adapter(folder, "back", world.texts, seed=75, scale=1.0, task="embedding")
        recorded = read_probes(folder)
        write_probes(folder, replace(recorded, effect=tuple(-effect for effect in recorded.effect)))
        assert world.store.add(folder) == old
    refused(server.put("back", {"source": old}), 422, "probes_failed")
    assert server.post("/v1/embeddings", {"input": "x", "adapter": "back"}).headers["x-embedft-adapter"] == own("back", new)


def test_a_generation_is_not_what_is_deleted(world: World, server: Server) -> None:
    generation = served(server, world, "whole", seed=74)
    name = own("whole", generation)
    refused(server.client.delete(f"/v1/adapters/{name}", headers=ADMIN), 404, "adapter_not_found")
    refused(server.post("/v1/unload_lora_adapter", {"lora_name": name}, headers=ADMIN), 404, "adapter_not_found")
    assert server.post("/v1/embeddings", {"input": "x", "adapter": "whole"}).status_code == 200


def test_vllms_load_and_unload_are_aliases(world: World, server: Server) -> None:
    served(server, world, "v", seed=72)

    def call(what: str, **body: Any) -> httpx.Response:
        return server.post(f"/v1/{what}_lora_adapter", body, headers=ADMIN)

    refused(call("load", lora_name="v", lora_path="v"), 400, "adapter_exists")
    assert call("unload", lora_name="v").status_code == 200
    assert call("load", lora_name="v", lora_path="v").status_code == 200
    assert call("load", lora_name="c", lora_path=world.store.current("b")).status_code == 200
    assert server.post("/v1/embeddings", {"input": "x", "model": "c"}).status_code == 200


def test_no_adapter_takes_the_name_of_an_alias_or_a_mix_however_it_is_loaded(world: World, server: Server) -> None:
    generation = served(server, world, "plain", seed=73)
    assert server.client.put("/v1/aliases/split", json={"variants": {"plain": 1}}, headers=ADMIN).status_code == 200
    for name in ("split", "mix-0", "x@y", "texts"):
        refused(server.put(name, {"source": generation}), 422, "adapter_invalid")
        for more in ({}, {"load_inplace": True}):
            body = {"lora_name": name, "lora_path": generation, **more}
            refused(server.post("/v1/load_lora_adapter", body, headers=ADMIN), 422, "adapter_invalid")
    assert server.client.delete("/v1/aliases/split", headers=ADMIN).status_code == 200


def test_a_source_outside_the_store_is_refused(world: World, server: Server, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    fill_adapter(outside, "z", world.texts, seed=80, scale=1.0, task="embedding")
    inside = world.store.root / "incoming"
    shutil.copytree(outside, inside)
    (world.store.root / "link").symlink_to(outside)
    shutil.copytree(outside, world.store.root / "objects" / ".stage-half")
    for source in (
        "objects",
        "objects/.stage-half",
        "objects/.stage-half/.",
        "../outside",
        str(outside),
        "link",
        "/dev",
        "http://127.0.0.1/x",
        "file:///etc",
        "objects/../../outside",
        "names",
        ".",
        "a\0b",
    ):
        refused(server.put("z", {"source": source}), 400, "source_refused")
    assert server.put("z", {"source": "incoming"}).status_code == 200
    assert world.store.current("z") == server.client.get("/v1/adapters/z").json()["generation"]
    assert server.put("y", {"source": str(inside)}).status_code == 200
    (inside / "model.bin").write_bytes(b"pickle")
    refused(server.put("z", {"source": "incoming"}), 422, "adapter_invalid")
    shutil.rmtree(world.store.root / "objects" / ".stage-half")


def test_names_that_are_none_are_refused(world: World, server: Server) -> None:
    for name in ("x@y", "ｘ", "x:y", "-x", "x" * 65, "x%00"):
        refused(server.client.put(f"/v1/adapters/{name}", json={"source": "a"}, headers=ADMIN), 422, "adapter_invalid")
    refused(server.put("texts", {"source": "a"}), 422, "adapter_invalid")
    refused(server.put("nix"), 404, "adapter_not_found")


def test_a_pattern_that_would_be_matched_for_ever_is_refused_before_the_engine_hears_of_it(world: World, server: Server) -> None:
    folder = world.store.root / "endless"
    folder.mkdir()
    fill_adapter(folder, "endless", world.texts, seed=190, scale=1.0, task="embedding")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": "(.*.*)*x"}))
    refused(server.put("endless", {"source": "endless"}), 422, "adapter_invalid")
    assert not [row for row in server.events("load") if row["adapter"].startswith("endless")]


def test_an_object_whose_content_was_changed_is_refused(world: World, server: Server) -> None:
    generation = put_adapter(world.store, "d", world.texts, seed=90)
    weights = world.store.folder(generation) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(bytes(content))
    refused(server.put("d"), 422, "adapter_invalid")


def test_a_rank_above_the_engines_is_refused_before_the_engine_hears_of_it(world: World, server: Server) -> None:
    put_adapter(world.store, "wide", world.texts, seed=91, r=65)
    refused(server.put("wide"), 422, "adapter_invalid")
    assert not [row for row in server.events("load") if row["adapter"].startswith("wide")]
