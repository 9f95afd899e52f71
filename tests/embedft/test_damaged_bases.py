"""Folders as they come from half a download, another tool or another version: what is wrong with them is said in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedft.base import BaseSpec, load_base
from embedft.causal_lm.evaluate import check_embedded, pad_token
from embedft.errors import BaseError, MethodUnsupported
from embedft.methods import supported
from embedft.recipe import AdapterSection
from tests.fixtures_lm import planted_recipe, tiny_llama, tiny_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 135\n"


def halved(name: str) -> Callable[[Path], None]:
    def halve(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return halve


def said(name: str, **values: Any) -> Callable[[Path], None]:
    def say(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | values), encoding="utf-8")

    return say


def written(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(content, encoding="utf-8")

    return write


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "half its weights": (halved("model.safetensors"), "damaged.*download it again"),
    "git-lfs's pointer": (written("model.safetensors", POINTER), "git lfs"),
    "half a config": (halved("config.json"), r"config\.json is malformed"),
    "a config that is a list": (written("config.json", "[]"), "holds no object"),
    "half a tokenizer": (halved("tokenizer.json"), "its tokenizer cannot be read"),
    "no tokenizer": (no_tokenizer, r"no tokenizer's files \(tokenizer\.json"),
    "another's config": (said("config.json", intermediate_size=192), "other shapes than its config.json"),
    "a family to come": (said("config.json", model_type="llama9"), "model type `llama9`"),
    "code of its own": (said("config.json", model_type="mine", auto_map={"AutoConfig": "c.C"}), "code of its own, which is never run"),
    "a tokenizer's code": (said("tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["t.T", None]}), "never run"),
    "a kernel that is not here": (said("config.json", quantization_config={"quant_method": "hqq", "nbits": 4}), "cannot be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_cannot_be_loaded_is_refused_in_words(damage: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base", layers=1)
    harm, words = DAMAGES[damage]
    harm(folder)
    with pytest.raises(BaseError, match=words):
        load_base(BaseSpec(str(folder)), task="causal_lm")


def test_a_scheme_that_nothing_trains_on_is_refused_with_those_that_do(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base", layers=1)
    said("config.json", quantization_config={"quant_method": "mxfp4"})(folder)
    with pytest.raises(MethodUnsupported, match="in mxfp4: take its unquantized weights, or those in nf4, int8"):
        supported(AdapterSection(), task="causal_lm", info=load_base(BaseSpec(str(folder)), task="causal_lm").info)


def test_a_token_that_the_weights_have_no_embedding_of_is_named(tmp_path: Path) -> None:
    from embedft.adapters.store import AdapterStore
    from embedft.causal_lm.train import train

    folder = tiny_llama(tmp_path / "base", layers=1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["red mean", "never said"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(BaseError, match=r"a row has 'red mean'.*resize_token_embeddings"):
        train(planted_recipe(tmp_path, folder), store=AdapterStore(tmp_path / "store"), progress=False)
    base = load_base(BaseSpec(str(folder)), task="causal_lm")
    check_embedded(base.model, base.tokenizer, [base.tokenizer("what is green?")["input_ids"], []])


def test_padding_takes_a_token_that_is_embedded() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert pad_token(tokenizer) == tokenizer.eos_token_id
