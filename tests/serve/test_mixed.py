"""Many LoRAs in one forward pass of the peft engine: each row as plain PEFT computes it alone, whoever stands beside it."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedft.base import BaseSpec, load_base, load_model
from serve.engines.peft.bank import AdapterBank
from serve.engines.peft.mixed import FIRST_SLOTS, Mix, MixedLinear
from serve.vllm_cpu_lora import native
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import featured_adapter, plain_peft

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"r": 1},
    "odd": {"r": 5, "use_rslora": True},
    "wide": {"r": 64, "lora_alpha": 8},
    "some": {"target_modules": ["q_proj", "down_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "words": {"target_modules": ["embed_tokens", "v_proj"]},
}


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setenv(native.OFF, "0")
    else:
        assert native.library() is not None, "this machine has a compiler"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixed")
    base = tiny_llama(root / "base")
    made = {name: featured_adapter(root / name, base, seed=seed, **config) for seed, (name, config) in enumerate(ADAPTERS.items())}
    for name in ("head", "words"):  # PEFT writes the whole layer too, which would be a base of its own
        weights = load_file(made[name] / "adapter_model.safetensors")
        save_file({key: tensor for key, tensor in weights.items() if "base_layer" not in key}, made[name] / "adapter_model.safetensors")
    return {"base": base} | made


def bank_of(folders: dict[str, Path], dtype: torch.dtype = torch.float32) -> AdapterBank:
    base = load_base(BaseSpec(str(folders["base"])), task="causal_lm")
    base.model.to(dtype)
    return AdapterBank(base)


def answered(bank: AdapterBank, names: list[str | None], **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        return bank.model(input_ids=PROMPT.repeat(len(names), 1), **bank.rows(names), **more).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_is_what_plain_peft_makes_of_it(folders: dict[str, Path], dtype: torch.dtype) -> None:
    """In float32 to 1e-5; in bf16 about as far from that as PEFT itself is there (the kernel also rounds between A and B)."""
    bank = bank_of(folders, dtype)
    for name in ADAPTERS:
        bank.load(name, folders[name])
    assert bank.group("words") == "words", "an adapted embedding runs apart"
    names = [None, *(name for name in ADAPTERS if name != "words"), "one", None]
    for keep in (0, 1):
        made = answered(bank, names, logits_to_keep=keep)
        for row, name in enumerate(names):
            exact, theirs = (alone(folders, name, kind, keep) for kind in (torch.float32, dtype))
            bound = 1e-5 * torch.linalg.norm(exact) if dtype == torch.float32 else 2.5 * torch.linalg.norm(theirs - exact)
            assert torch.linalg.norm(made[row].float() - exact) <= bound, name


def alone(folders: dict[str, Path], name: str | None, dtype: torch.dtype, keep: int) -> torch.Tensor:
    """By PEFT's own loader on a base of `dtype`, in float32."""
    model: Any = plain_peft(folders["base"], folders[name]) if name else load_model(folders["base"], task="causal_lm")
    with torch.inference_mode():
        return model.to(dtype)(input_ids=PROMPT, logits_to_keep=keep).logits[0].float()


def test_a_row_does_not_depend_on_its_neighbours(folders: dict[str, Path]) -> None:
    bank = bank_of(folders)
    for name in ("odd", "wide"):
        bank.load(name, folders[name])
    alone = {name: answered(bank, [name])[0] for name in ("odd", "wide", None)}
    for names in (["odd", "wide", None], [None, "odd", "odd", "wide"], ["wide", "wide"]):
        for made, name in zip(answered(bank, names), names, strict=True):
            assert torch.allclose(made, alone[name], atol=1e-5)


def test_more_adapters_than_there_was_room_for_and_places_that_became_free(folders: dict[str, Path]) -> None:
    bank = bank_of(folders)
    for number in range(FIRST_SLOTS + 3):
        bank.load(f"a{number}", folders["odd" if number % 2 else "wide"])
    wanted = answered(bank, ["a0", "a1"])
    assert torch.allclose(answered(bank, [f"a{FIRST_SLOTS + 2}", f"a{FIRST_SLOTS + 1}"]), wanted, atol=1e-5)
    bank.unload("a4")
    bank.load("again", folders["odd"])
    assert torch.allclose(answered(bank, ["a6", "again"]), wanted, atol=1e-5)


def test_an_adapter_of_few_layers_beside_many_of_all(folders: dict[str, Path]) -> None:
    """Its place is beyond the tables of the layers that it leaves alone."""
    bank = bank_of(folders)
    bank.load("some alone", folders["some"])
    wanted = answered(bank, ["some alone", None])
    for number in range(FIRST_SLOTS - 1):
        bank.load(f"a{number}", folders["odd"])
    bank.load("some", folders["some"])
    assert torch.allclose(answered(bank, ["some", None, "a0"])[:2], wanted, atol=1e-5)


def test_what_is_unloaded_is_freed_and_the_base_is_the_base_again(folders: dict[str, Path]) -> None:
    bank = bank_of(folders)
    before = answered(bank, [None])
    content = bank.read("odd", folders["odd"])
    assert content.pairs is not None
    held = [weakref.ref(tensor) for pair in content.pairs.values() for tensor in pair]
    bank.put("odd", content)
    del content
    assert not torch.allclose(answered(bank, ["odd"]), before, atol=1e-2)
    assert all(tensor() is not None for tensor in held)
    bank.unload("odd")
    assert all(tensor() is None for tensor in held)
    assert torch.equal(answered(bank, [None]), before)


def test_rows_of_different_lengths_are_no_mixed_batch() -> None:
    mix = Mix()
    layer = MixedLinear(torch.nn.Linear(4, 3), mix)
    layer.put(0, (torch.ones(2, 4), torch.ones(2, 3)))
    with mix.of([0, -1]), pytest.raises(ValueError, match="5 tokens are no whole number for each of 2 rows"):
        layer(torch.ones(5, 4))
