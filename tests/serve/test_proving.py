"""Adapters without passport: what plain PEFT makes of their config, or that it makes nothing of it. And what its process may know."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from embedft.adapters.passport import CONFIG
from embedft.adapters.store import AdapterStore
from embedft.errors import AdapterInvalid
from serve.prover import Prover
from serve.proving import import_unproven
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import featured_adapter


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


def test_the_process_that_reads_what_strangers_wrote_has_not_the_admins_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, told = tmp_path / "python", tmp_path / "told"
    program.write_text(f"#!/bin/sh\nenv > {told}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("EMBEDFT_ADMIN_TOKEN", "secret")
    asyncio.run(Prover()._run("x", {}))  # pyright: ignore[reportPrivateUsage]
    assert "HF_HUB_OFFLINE" in told.read_text()
    assert "EMBEDFT_ADMIN_TOKEN" not in told.read_text()
