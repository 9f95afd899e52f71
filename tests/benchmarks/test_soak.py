"""The soak, for 90 seconds on the peft engine, with fewer slots than adapters: no answer is wrong and none is lost."""

import copy
import random
import time
from collections.abc import Iterator

import pytest

from benchmarks.soak import serve, soak
from benchmarks.soaking.report import Report, summary
from benchmarks.soaking.traffic import Client
from benchmarks.soaking.world import World, make_world
from tests.fixtures_embedding import tiny_encoder
from tests.fixtures_lm import tiny_llama
from tests.serve.world import Server

SECONDS = 90.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("soak")
    encoder, llama = tiny_encoder(folder / "encoder", pooling="cls"), tiny_llama(folder / "llama")
    return make_world(folder, embedding=encoder, language=llama, count=10, scale=0.3)  # far apart: a swap always fails


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Server]:
    running = serve(world, engine="peft", slots=3)
    yield running
    assert running.stop() == 0


def test_ninety_seconds_of_everything_lose_nothing_and_mix_nothing_up(world: World, server: Server) -> None:
    report = soak(world, server.url, server.process.pid, seconds=SECONDS, workers=6, kill_every=SECONDS / 3, rest=2)
    found = summary(report, seconds=SECONDS)
    assert found["examples"] == []
    assert (found["wrong"], found["lost"]) == (0, 0), found
    assert found["sent"] == found["answered"] + found["cancelled"] + sum(found["refused"].values())
    assert found["done"]["kill"] == 2
    assert found["answered"] > 50
    assert found["cancelled"] > 1
    assert found["done"]["reload"] > 1
    refused = {kind for kind in found["done"] if kind.startswith("bad load refused")}
    assert len(refused) >= 3, found["done"]
    server.wait_ready(200)


def test_of_half_a_character_an_engine_may_say_nothing_and_of_no_other(world: World) -> None:
    half = next(token for token in range(400) if "\ufffd" in world.word(token))
    whole = next(token for token in range(400) if world.word(token).isalpha())
    assert world.says(["", world.word(half), world.word(whole)], [half, half, whole])
    assert not world.says([""], [whole])
    assert not world.says(["x"], [half])
    assert not world.says([], [half])


def test_the_soak_sees_an_answer_of_another_adapter(world: World, server: Server) -> None:
    swapped = copy.deepcopy(world)
    for base, names in world.names.items():
        first, second = (world.generations[name][0] for name in names[1:3])
        swapped.solo[base][first], swapped.solo[base][second] = world.solo[base][second], world.solo[base][first]
    report, expected = Report(), {name for names in world.names.values() for name in names[1:3]}
    for turn in range(20):
        Client(swapped, server.url, report, time.monotonic() + 3, random.Random(turn)).run()
        if {text.partition(":")[0] for text in report.wrong} == expected:
            return
    raise AssertionError((expected, report.wrong))
