"""What sentence-transformers' files in a base folder say, against sentence-transformers itself; what is not here is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedft.base import BaseSpec, load_base
from embedft.embedding.train import settings_for
from embedft.encode import Encoder
from embedft.errors import BaseError
from embedft.model_folder import describe
from embedft.quantize import quantize
from embedft.recipe import EmbeddingRecipe, parse_recipe
from embedft.vectors import published_settings
from tests.fixtures_embedding import disagree, tiny_decoder, tiny_encoder

TEXTS = ["red apple", "a green tree in the garden"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("published") / "base", pooling="mean")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def write_prompts(folder: Path, **config: Any) -> None:
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ({"query": "find : ", "document": "text : "}, ("query", "document")),
        ({"query": "find : ", "passage": "text : ", "corpus": "all : "}, ("query", "passage")),
        ({"corpus": "text : ", "classification": "class : "}, (None, "corpus")),
        ({"query": "", "document": "", "passage": "text : "}, (None, None)),
        ({"query": None, "document": None, "any": "say : "}, (None, None)),
        (None, (None, None)),
    ],
)
def test_a_base_is_asked_with_its_own_prompts(copy: Path, prompts: Any, named: tuple[str | None, str | None]) -> None:
    from sentence_transformers import SentenceTransformer

    if prompts is not None:
        write_prompts(copy, prompts=prompts)
    theirs = SentenceTransformer(str(copy), device="cpu")
    loaded = load_base(BaseSpec(str(copy)), task="embedding")
    encoder = Encoder(loaded.model, copy, published_settings(loaded.info, 32))
    plain = encoder.encode(TEXTS)
    for kind, name in zip(("query", "document"), named, strict=True):
        ours = encoder.encode(TEXTS, input_type="query" if kind == "query" else "document")
        np.testing.assert_allclose(ours, theirs.encode(TEXTS, prompt_name=name), atol=2e-2)
        assert (np.abs(ours - plain).max() > 0.1) == bool(name)
        assert (kind in loaded.info.prompts) == bool(name)
    assert describe(quantize(copy, copy.parent / "int8", scheme="int8")).prompts == loaded.info.prompts


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, {"query": "find : ", "document": "text : "}),
        ({"query": ""}, {"query": "", "document": "text : "}),
        ({"query": "other : ", "document": ""}, {"query": "other : ", "document": ""}),
    ],
)
def test_a_recipe_says_only_what_is_to_differ_from_them(
    copy: Path, given: dict[str, str], used: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(copy, prompts={"query": "find : ", "document": "text : "})
    entries = {"task": "embedding", "name": "n", "base": {"model": str(copy)}, "data": {"train": "none", "prompts": given}}
    recipe = parse_recipe(entries)
    assert isinstance(recipe, EmbeddingRecipe)
    assert settings_for(recipe, load_base(BaseSpec(str(copy)), task="embedding")).prompts == used
    assert ("the base's own prompts" in capsys.readouterr().err) == (used != given), "what the recipe does not say is told"


@pytest.mark.parametrize("what", ["Dense", "LayerNorm", "mean and max", "weightedmean", "max", "leaves the prompt's tokens out"])
def test_vectors_that_are_made_by_what_is_not_here_are_refused_by_name(base: Path, tmp_path: Path, what: str) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Pooling

    model = SentenceTransformer(str(base), device="cpu")
    last: dict[str, Any] = {"Dense": Dense(64, 16), "LayerNorm": LayerNorm(64)}
    pooling = {"mean and max": ("mean", "max"), "weightedmean": "weightedmean", "max": "max"}.get(what, "mean")
    modules = [model[0], Pooling(64, pooling, include_prompt="prompt" not in what), *([last[what]] if what in last else [])]  # pyright: ignore
    folder = tmp_path / "made"
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    with pytest.raises(BaseError, match=what):
        describe(folder)
    (folder / "modules.json").unlink()
    assert describe(folder).pooling == "mean", "its bare transformer can be a base"


@pytest.mark.parametrize("flag", ["pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens"])
def test_what_older_versions_wrote_is_refused_too(copy: Path, flag: str) -> None:
    path = copy / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"word_embedding_dimension": 64, "pooling_mode_cls_token": False, flag: True}))
    with pytest.raises(BaseError, match=flag.removeprefix("pooling_mode_").removesuffix("_tokens")):
        describe(copy)


def test_a_module_of_somebody_elses_code_is_refused(copy: Path) -> None:
    modules = json.loads((copy / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(BaseError, match=r"custom_st\.Transformer"):
        describe(copy)


@pytest.mark.parametrize(
    "name", ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"]
)
def test_a_damaged_file_is_named(copy: Path, name: str) -> None:
    for content in ("{", "3"):
        (copy / name).write_text(content)
        with pytest.raises(BaseError, match=f"{name} is damaged"):
            describe(copy)


@pytest.mark.parametrize("saved_as", ["tokenizer_config.json", "sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_a_text_is_read_as_far_as_sentence_transformers_reads_it(copy: Path, saved_as: str) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(copy), device="cpu")
    model.max_seq_length = 9
    folder = copy.parent / "saved"
    model.save(str(folder))
    settings = folder / "sentence_bert_config.json"
    assert "max_seq_length" not in json.loads(settings.read_text()), "version 6 leaves it to the tokenizer"
    if saved_as != "tokenizer_config.json":
        settings.unlink()
        (folder / saved_as).write_text(json.dumps({"max_seq_length": 7, "do_lower_case": False}))
    loaded = load_base(BaseSpec(str(folder)), task="embedding")
    assert loaded.info.max_length == (9 if saved_as == "tokenizer_config.json" else 7)
    assert describe(quantize(folder, copy.parent / "int8", scheme="int8")).max_length == loaded.info.max_length
    ours = Encoder(loaded.model, folder, published_settings(loaded.info, loaded.info.max_length)).encode([*TEXTS, "find " * 20])
    np.testing.assert_allclose(ours, SentenceTransformer(str(folder), device="cpu").encode([*TEXTS, "find " * 20]), atol=2e-2)


def test_a_language_models_context_is_what_it_can_place_whatever_its_tokenizer_says(tmp_path: Path) -> None:
    folder = tiny_decoder(tmp_path / "lm")
    assert describe(folder).max_length == 32
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 64
    assert describe(folder).max_length == 128


@pytest.mark.parametrize(
    ("name", "changed", "match"),
    [
        ("config_sentence_transformers.json", {"truncate_dim": 16}, "keeps 16 components"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "manhattan"}, "compared by manhattan"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "lower-cases texts"),
        ("sentence_bert_config.json", {"query_length": 8}, "query_length of its own"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask", "module_output_name": "logits"}, "module_output_name is logits"),
        ("sentence_bert_config.json", {"modality_config": {"text": {"method_output_name": "pooler_output"}}}, "is pooler_output"),
    ],
)
def test_what_would_change_its_vectors_or_their_order_is_refused(copy: Path, name: str, changed: dict[str, Any], match: str) -> None:
    (copy / name).write_text(json.dumps({**json.loads((copy / name).read_text()), **changed}))
    with pytest.raises(BaseError, match=match):
        describe(copy)


def test_a_base_compared_by_dot_product_is_taken_where_that_is_the_cosine(copy: Path) -> None:
    write_prompts(copy, similarity_fn_name="dot")
    describe(copy)
    modules = json.loads((copy / "modules.json").read_text())
    (copy / "modules.json").write_text(json.dumps(modules[:2]))
    with pytest.raises(BaseError, match="compared by dot"):
        describe(copy)


def test_a_base_that_lower_cases_by_its_tokenizer_too_is_taken(copy: Path) -> None:
    (copy / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": True}))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "Lowercase"}}))
    assert describe(copy).max_length == 32


def test_a_folder_without_pooling_or_with_its_transformer_elsewhere_is_refused(copy: Path) -> None:
    modules = json.loads((copy / "modules.json").read_text())
    for listed, match in ((modules[:1], "has no Pooling"), ([{**modules[0], "path": "0_BERT"}, *modules[1:]], "lies in 0_BERT")):
        (copy / "modules.json").write_text(json.dumps(listed))
        with pytest.raises(BaseError, match=match):
            describe(copy)


def test_a_cross_encoder_is_no_base_for_vectors(base: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    CrossEncoder(str(base), num_labels=1, device="cpu").save(str(tmp_path / "cross"))
    assert describe(tmp_path / "cross").max_length == 64, "it is served as what it is"
    with pytest.raises(BaseError, match="is a cross-encoder"):
        load_base(BaseSpec(str(tmp_path / "cross")), task="embedding")


def test_no_vector_is_made_where_a_bases_tokenizer_files_disagree(copy: Path) -> None:
    disagree(copy)
    loaded = load_base(BaseSpec(str(copy)), task="embedding")
    with pytest.raises(BaseError, match="disagree"):
        Encoder(loaded.model, copy, published_settings(loaded.info, 32))
