"""Adapters without passport: what plain PEFT makes of their config, or that it makes nothing of it. And what its process may know."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from embedft.adapters.passport import CONFIG, WEIGHTS, read_passport
from embedft.adapters.store import AdapterStore
from embedft.base import load_model
from embedft.errors import AdapterInvalid, EngineBusy
from embedft.methods import load_adapter
from serve.foreign import take
from serve.prover import MAX_WAITING, Prover
from serve.proving import import_unproven, mix, run
from tests.fixtures_embedding import text, tiny_encoder
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import featured_adapter, plain_peft
from tests.serve.world import wait_for


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
    [
        ({"r": "8"}, "'found' cannot be used: plain PEFT cannot load it"),
        ({"r": 0}, "'found' cannot be used: plain PEFT cannot load it"),
        ({"lora_alpha": float("nan")}, "not finite"),
        ({"target_modules": "(q_proj"}, "'found' cannot be used: target_modules .* is no regular expression"),
        ({"target_modules": ["k_proj"]}, "'found' cannot be used: tensor .*k_proj"),
        (
            {"init_lora_weights": "pissa"},
            "'found' cannot be used: pissa starts from a changed base.*path_initial_model",
        ),
        ({"init_lora_weights": "olora"}, "olora starts from a changed base"),
        ({"alora_invocation_tokens": [5, 6]}, "sets alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "sets layer_replication"),
        ({"use_nova": True}, r"sets use_nova, which the PEFT here \(.*\) does not know"),
        ({"nova_config": {"depth": 2}}, "sets nova_config, which"),
    ],
)
def test_a_config_that_makes_no_adapter_is_told_and_nothing_is_imported(
    tmp_path: Path, llama: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AdapterInvalid, match=reason):
        imported(tmp_path, llama, changes)
    assert AdapterStore(tmp_path / "store").names() == {}


def test_settings_of_another_peft_that_switch_nothing_on_keep_no_adapter_out(tmp_path: Path, llama: Path) -> None:
    idle = {"use_nova": False, "nova_config": None, "nova_rank": 4, "enable_lora": None, "merge_weights": False, "nova_bias": "none"}
    assert list(imported(tmp_path, llama, idle).names()) == ["found"]


def test_of_a_trainers_folder_the_adapter_alone_is_read(tmp_path: Path, llama: Path) -> None:
    import torch

    source, store = featured_adapter(tmp_path / "run", llama, seed=3), AdapterStore(tmp_path / "store")
    shutil.copytree(source, source / "checkpoint-2")
    for place in (source, source / "checkpoint-2"):
        for pickled in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
            torch.save({}, place / pickled)
    import_unproven(store, source, name="found", base=str(llama), task="causal_lm")
    left = {path.name for path in store.folder("found").iterdir()}
    assert left == {CONFIG, WEIGHTS, "passport.json", "probes.safetensors"}
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.bin is a pickle"):
        import_unproven(store, source, name="pickled", base=str(llama), task="causal_lm")


def test_an_adapter_that_sentence_transformers_saved_makes_the_vectors_that_it_makes_there(tmp_path: Path) -> None:
    import numpy as np
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer

    from embedft.encode import Encoder, EncodeSettings

    base = tiny_encoder(tmp_path / "base", pooling="mean")
    made: Any = SentenceTransformer(str(base), device="cpu", prompts={"query": "find : ", "document": ""})
    made[1].pooling_mode = made[1].pooling_mode_cls_token = "cls"
    made.max_seq_length = 7
    made.add_adapter(LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False))
    made.save(str(tmp_path / "saved"))
    store = AdapterStore(tmp_path / "store")
    import_unproven(store, tmp_path / "saved", name="found", base=str(base), task="embedding")
    passport = read_passport(store.folder("found"))
    assert (passport.pooling, passport.prompts, passport.max_length) == ("cls", {"query": "find : "}, 7)
    model = load_adapter(load_model(base, task="embedding"), store.folder("found"))
    settings = EncodeSettings("cls", True, passport.max_length, passport.prompts)
    texts = [text("query", topic, topic) for topic in range(4)]
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(texts, prompt_name="query", normalize_embeddings=True)
    assert np.allclose(Encoder(model, base, settings).encode(texts, input_type="query"), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "targets"), [("MaskedLM", ["query", "value"]), ("MaskedLM", ["bert.encoder.layer.1.output.dense"]), ("", ["query"])]
)
def test_an_adapter_that_was_trained_under_a_head_is_the_same_without_it(tmp_path: Path, head: str, targets: list[str]) -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    base = tiny_encoder(tmp_path / "base", pooling="mean")
    loader: Any = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    patterns: dict[str, Any] = {"alpha_pattern": {f"{'bert.' if head else ''}encoder.layer.1.attention.self.query": 32}}
    made: Any = get_peft_model(loader.from_pretrained(base), LoraConfig(target_modules=targets, init_lora_weights=False, **patterns))
    made.eval().save_pretrained(tmp_path / "made")
    store = AdapterStore(tmp_path / "store")
    import_unproven(store, tmp_path / "made", name="found", base=str(base), task="embedding")
    ids = torch.tensor([[5, 6, 7, 8]])
    ours = load_adapter(load_model(base, task="embedding"), store.folder("found"))(input_ids=ids).last_hidden_state
    inner = made.get_base_model().bert if head else made
    assert torch.allclose(ours, inner(input_ids=ids).last_hidden_state, atol=1e-5)


def test_what_peft_copies_of_the_base_beside_an_adapter_is_left_out(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    llama = tiny_llama(tmp_path / "base", layers=1)
    features: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    source = featured_adapter(tmp_path / "made", llama, seed=3, **features)
    written = load_file(str(source / WEIGHTS))
    copies = [key for key in written if "lora" not in key]
    assert len(copies) == 2, "PEFT writes both embeddings beside their updates"
    store = AdapterStore(tmp_path / "store")
    import_unproven(store, source, name="found", base=str(llama), task="causal_lm")
    assert load_file(str(store.folder("found") / WEIGHTS)).keys() == written.keys() - set(copies)
    ids = torch.tensor([[5, 6, 7, 8]])
    ours = load_adapter(load_model(llama, task="causal_lm"), store.folder("found"))(input_ids=ids).logits
    assert torch.allclose(ours, plain_peft(llama, source)(input_ids=ids).logits, atol=1e-4)

    save_file({**written, copies[0]: written[copies[0]] + 1}, str(source / WEIGHTS), metadata={"format": "pt"})
    with pytest.raises(AdapterInvalid, match=r"'other' cannot be used: it brings a .* of its own, other than the base's"):
        import_unproven(store, source, name="other", base=str(llama), task="causal_lm")
    grown = {key: torch.cat([written[key], written[key][:1]]) for key in copies}
    save_file({**written, **grown}, str(source / WEIGHTS), metadata={"format": "pt"})
    tokens = written[copies[0]].shape[0]
    with pytest.raises(AdapterInvalid, match=f"a base of {tokens + 1} tokens, and this one has {tokens}: save the base after"):
        import_unproven(store, source, name="grown", base=str(llama), task="causal_lm")


def test_an_adapter_below_the_folder_that_was_named_is_found_and_a_pointer_is_called_one(tmp_path: Path, llama: Path) -> None:
    source, store = featured_adapter(tmp_path / "run" / "mine", llama, seed=3), AdapterStore(tmp_path / "store")
    with pytest.raises(AdapterInvalid, match=r"lacks adapter_config\.json: mine in it has one; name that folder"):
        import_unproven(store, source.parent, name="found", base=str(llama), task="causal_lm")
    (source / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 135\n")
    with pytest.raises(AdapterInvalid, match="a pointer of git-lfs"):
        import_unproven(store, source, name="found", base=str(llama), task="causal_lm")


def test_links_as_the_hubs_cache_has_them_are_followed_for_who_imports_and_never_for_a_server(tmp_path: Path, llama: Path) -> None:
    made, store = featured_adapter(tmp_path / "blobs", llama, seed=3), AdapterStore(tmp_path / "store")
    (tmp_path / "snapshot").mkdir()
    for path in (CONFIG, WEIGHTS):
        (tmp_path / "snapshot" / path).symlink_to(made / path)
    import_unproven(store, tmp_path / "snapshot", name="found", base=str(llama), task="causal_lm")
    assert not any(path.is_symlink() for path in store.folder("found").iterdir())
    (tmp_path / "stage").mkdir()
    with pytest.raises(AdapterInvalid, match="is a link"):
        take(tmp_path / "snapshot", tmp_path / "stage", "found")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (made / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(AdapterInvalid, match="1_Pooling is a link"):
        take(made, tmp_path / "other", "found")


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


def test_an_import_ends_with_its_gateway_however_that_ends(tmp_path: Path, llama: Path) -> None:
    os.mkfifo(tmp_path / CONFIG)  # which nobody writes to: it is read for ever
    job = {"kind": "import", "folder": str(tmp_path), "base": str(llama), "task": "causal_lm", "name": "x"}
    gateway = f"import asyncio; from serve.prover import Prover; asyncio.run(Prover()._run('x', {job}))"
    with subprocess.Popen([sys.executable, "-c", gateway]) as process:
        wait_for(lambda: psutil.Process(process.pid).children())
        (proving,) = psutil.Process(process.pid).children()
        process.kill()
    wait_for(lambda: not proving.is_running() or proving.status() == psutil.STATUS_ZOMBIE)


def test_why_an_import_is_refused_is_said_once(tmp_path: Path, llama: Path) -> None:
    source = featured_adapter(tmp_path / "made", llama, seed=3, target_modules=["q_proj"])
    (source / CONFIG).write_text(json.dumps({**json.loads((source / CONFIG).read_text()), "r": "8"}))
    job = {"kind": "import", "folder": str(source), "base": str(llama), "task": "causal_lm", "name": "found"}
    with pytest.raises(AdapterInvalid) as refused:
        asyncio.run(Prover()._run("found", job))  # pyright: ignore[reportPrivateUsage]
    assert str(refused.value).count("cannot be used") == 1


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
