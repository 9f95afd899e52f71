"""Adapters without passport: what plain PEFT makes of their config, or that it makes nothing of it. And what its process may know."""

import asyncio
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from embedft.adapters.passport import CONFIG, read_passport
from embedft.adapters.store import AdapterStore
from embedft.errors import AdapterInvalid, EngineBusy
from serve.prover import MAX_WAITING, Prover
from serve.proving import import_unproven, mix, run
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import featured_adapter, plain_peft


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("proving") / "llama")


def imported(folder: Path, llama: Path, changes: dict[str, Any], **features: Any) -> AdapterStore:
    """The store that an adapter was imported into, of `features` and with `changes` to what its config says of them."""
    source, store = featured_adapter(folder / "made", llama, seed=3, target_modules=["q_proj"], **features), AdapterStore(folder / "store")
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps({**config, **changes}))
    import_unproven(store, source, name="found", base=str(llama), task="causal_lm")
    return store


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"r": "8"}, "plain PEFT cannot load it"), ({"r": 0}, "plain PEFT cannot load it"), ({"lora_alpha": float("nan")}, "not finite")],
)
def test_a_config_that_makes_no_adapter_is_told_and_nothing_is_imported(
    tmp_path: Path, llama: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AdapterInvalid, match=reason):
        imported(tmp_path, llama, changes)
    assert AdapterStore(tmp_path / "store").names() == {}


def test_an_imported_dora_is_called_one(tmp_path: Path, llama: Path) -> None:
    assert imported(tmp_path, llama, {}, use_dora=True).passport("found").method == "dora"


PATTERNS: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5, "layers.0.self_attn.q_proj": 3}}


def effects(base: Path, adapter: Path) -> dict[str, Any]:
    """What the adapter adds to each layer's weights, by PEFT."""
    modules = plain_peft(base, adapter).base_model.model.named_modules()
    return {name: module.get_delta_weight("default") for name, module in modules if hasattr(module, "get_delta_weight")}


def test_a_mix_is_exact_however_its_members_scale_their_parts(tmp_path: Path, llama: Path) -> None:
    features = [{"use_rslora": True, **PATTERNS}, {"target_modules": ["q_proj", "up_proj"], "r": 3}, PATTERNS]
    members = [
        (featured_adapter(tmp_path / str(n), llama, seed=n, **more), weight)
        for n, (more, weight) in enumerate(zip(features, (0.7, -0.5, 1.0), strict=True))
    ]
    out = tmp_path / "mix"
    out.mkdir()
    mix(members, out, name="mix-1")
    made, parts = effects(llama, out), [(effects(llama, folder), weight) for folder, weight in members]
    assert made.keys() == {name for part, _ in parts for name in part}
    for name, effect in made.items():
        wanted = sum(weight * part[name] for part, weight in parts if name in part)
        assert float((effect - wanted).abs().max()) < 1e-4 * float(effect.abs().max()), name


@pytest.mark.parametrize("unproven", [(), (0,), (1,)])
def test_a_mix_is_as_proven_as_its_members(tmp_path: Path, llama: Path, unproven: tuple[int, ...]) -> None:
    members: list[tuple[str, float]] = []
    for number in range(2):
        folder = imported(tmp_path / str(number), llama, {}).folder("found")
        passport = read_passport(folder)
        assert passport.unproven, "nobody but plain PEFT has looked at it"
        own = tmp_path / f"own {number}"
        shutil.copytree(folder, own)
        passport.model_copy(update={"unproven": number in unproven}).write(own)
        members.append((str(own), 0.5))
    out = tmp_path / "mix"
    out.mkdir()
    run({"kind": "mix", "folder": str(out), "base": str(llama), "task": "causal_lm", "name": "mix-1", "members": members})
    assert read_passport(out).unproven is bool(unproven)


def test_who_gives_up_an_import_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, told = tmp_path / "python", tmp_path / "told"
    program.write_text(f"#!/bin/sh\necho $$ > {told}.new; mv {told}.new {told}\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    async def check() -> None:
        proving = asyncio.create_task(Prover()._run("x", {}))  # pyright: ignore[reportPrivateUsage]
        while not told.exists():
            await asyncio.sleep(0.01)
        proving.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError):
                await proving
        assert not psutil.pid_exists(int(told.read_text()))

    asyncio.run(check())


def test_only_so_many_wait_to_be_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, engine = asyncio.Event(), SimpleNamespace(folder=Path(), config=SimpleNamespace(task="embedding"), public_model="", max_length=1)

    async def waits(*_: Any) -> None:
        await gate.wait()

    async def check() -> None:
        prover = Prover()

        async def prove() -> None:
            await prover.prove("import", Path(), name="x", engine=cast("Any", engine))

        waiting = [asyncio.create_task(prove()) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy):
            await prove()
        gate.set()
        await asyncio.gather(*waiting)
        await prove()

    monkeypatch.setattr(Prover, "_run", waits)
    asyncio.run(check())


def test_the_process_that_reads_what_strangers_wrote_has_not_the_admins_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, told = tmp_path / "python", tmp_path / "told"
    program.write_text(f"#!/bin/sh\nenv > {told}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("EMBEDFT_ADMIN_TOKEN", "secret")
    asyncio.run(Prover()._run("x", {}))  # pyright: ignore[reportPrivateUsage]
    assert "HF_HUB_OFFLINE" in told.read_text()
    assert "EMBEDFT_ADMIN_TOKEN" not in told.read_text()
