"""Folders as they come from half a download, another tool or another version: what is wrong with them is said in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedft.base import BaseSpec, load_base
from embedft.causal_lm.evaluate import check_embedded, pad_token
from embedft.causal_lm.sizes import batch_for
from embedft.errors import BaseError, BaseNotFound, MethodUnsupported
from embedft.methods import supported
from embedft.plan import plan
from embedft.recipe import AdapterSection
from tests.families import tiny_embedder
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


def an_adapter_beside(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_base(BaseSpec(str(folder)), task="causal_lm").model
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(folder))


def a_shard_less(folder: Path) -> None:
    model = load_base(BaseSpec(str(folder)), task="causal_lm").model
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    next(folder.glob("model-00002-of-*")).unlink()


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
    "eyes of its own": (said("config.json", vision_config={"hidden_size": 8}), "no model of text alone.* a vision_config"),
    "a model within a model": (said("config.json", text_config={"hidden_size": 8}), "no model of text alone"),
    "an adapter beside it": (an_adapter_beside, "holds an adapter beside its weights"),
    "a shard less": (a_shard_less, r"lacks 1 of \d+ files of weights \(model-00002-of-"),
    "a kernel that is not here": (said("config.json", quantization_config={"quant_method": "hqq", "nbits": 4}), "cannot be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_cannot_be_loaded_is_refused_in_words(damage: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base", layers=1)
    harm, words = DAMAGES[damage]
    harm(folder)
    with pytest.raises(BaseError, match=words):
        load_base(BaseSpec(str(folder)), task="causal_lm")


def test_a_plan_refuses_what_training_would(tmp_path: Path) -> None:
    seeing = tiny_llama(tmp_path / "seeing", layers=1)
    said("config.json", text_config={"hidden_size": 8})(seeing)
    for base, words in ((tiny_embedder(tmp_path / "encoder", "bert"), "it writes nothing"), (seeing, "no model of text alone")):
        recipe = planted_recipe(tmp_path, base)
        with pytest.raises(BaseError, match=words):
            plan(recipe, batch_for(recipe))


def test_an_adapter_that_is_named_as_a_base_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')
    with pytest.raises(BaseNotFound, match="is an adapter and no base: name org/model"):
        load_base(BaseSpec(str(tmp_path)), task="causal_lm")


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
