"""Publishing, verifying, converting and merging, for every method of the table."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedft.adapters.card import model_card
from embedft.adapters.passport import read_passport
from embedft.adapters.probes import read_probes
from embedft.adapters.store import AdapterStore
from embedft.base import load_model
from embedft.causal_lm.train import train
from embedft.convert import CERTIFICATE, convert
from embedft.errors import AdapterInvalid, BaseMismatch, MethodUnsupported, ProbesFailed, UsageError
from embedft.merge import combine, merge
from embedft.methods import METHODS, load_adapter
from embedft.methods.companion import lora_layers
from embedft.model_folder import own_template, template_hash, tokenizer_of
from embedft.recipe import parse_recipe
from embedft.verify import outputs, verify
from serve.proving import import_unproven
from tests.embedft.methods.cells import QUANTIZED, WHOLE
from tests.embedft.methods.published import published
from tests.fixtures_lm import planted_recipe, tiny_llama
from tests.serve.engine_process import featured_adapter

# Methods whose files are laid out alike are one another's tests; with WHOLE every method.
ALIKE = {"rslora", "eva", "lora_plus", "lora_fa", "llm_int8", "olora", "p_tuning", "multitask_prompt_tuning"}
CHOSEN = [name for name in METHODS if WHOLE or name not in ALIKE]


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(range(40, 60))])).logits


@pytest.mark.parametrize("method", CHOSEN)
def test_what_is_published_passes_its_probes_and_without_a_part_of_it_does_not(adapter: Any, method: str) -> None:
    folder, base = adapter(method)
    report = verify(folder, base=base)
    assert report.passed, report.reason
    assert report.error < 1e-3
    passport = read_passport(folder)
    assert passport.probes is not None
    assert passport.probes.sensitivity
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" or not METHODS[method].vllm
    if config["peft_type"] == "LORA":
        assert passport.r == config["r"]
    assert (passport.r > 0, passport.alpha > 0) == (METHODS[method].rank, METHODS[method].alpha)
    assert (" r=" in model_card(passport)) == METHODS[method].rank


@pytest.mark.parametrize("method", CHOSEN)
def test_conversion_gives_plain_lora_or_is_refused_as_the_table_says(adapter: Any, method: str, tmp_path: Path) -> None:
    import torch

    folder, base = adapter(method)
    row = METHODS[method]
    if row.to_lora == "no":
        with pytest.raises(MethodUnsupported, match="serve it by the peft engine"):
            convert(folder, tmp_path / "out", name="x", base=base)
        return
    certificate = convert(folder, tmp_path / "out", name="x", base=base, rank=None if row.to_lora != "approximate" else 128)
    passport = read_passport(tmp_path / "out")
    assert (passport.method, passport.name, passport.r) == ("lora", "x", certificate.rank)
    assert json.loads((tmp_path / "out" / CERTIFICATE).read_text())["exact_rank"] == certificate.exact_rank
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"adapter": "x"' in card
    assert f"| Method | lora, r={certificate.rank}" in card
    original, plain = (load_adapter(load_model(base, task="causal_lm"), each) for each in (folder, tmp_path / "out"))
    assert certificate.exact
    assert certificate.error < 1e-4
    # AdaLoRA's and LoHa's own ranks bound what a copy needs; DoRA's and LoKr's do not
    bound = {"adalora": 6, "loha": 16, "vera": 4, "relora": 12, "delta_lora": 8, "pissa": 8, "olora": 8}
    if row.to_lora != "approximate":
        assert certificate.exact_rank <= bound.get(method, 4)
    else:
        assert certificate.exact_rank > 16
    error = torch.linalg.vector_norm(logits(original) - logits(plain)) / torch.linalg.vector_norm(logits(original))
    assert error < 1e-2


def test_a_rank_too_small_fails_the_probes_and_says_what_to_do(adapter: Any, tmp_path: Path) -> None:
    folder, base = adapter("lokr")
    with pytest.raises(ProbesFailed, match="give a higher --rank, or serve it by the peft engine"):
        convert(folder, tmp_path / "out", name="x", base=base, rank=1)


def test_the_figures_of_a_converted_adapter_are_said_to_be_of_the_one_that_was_measured(tmp_path: Path, bases: dict[str, Path]) -> None:
    content = planted_recipe(tmp_path, bases["causal_lm"], test_rows=6, train={"max_steps": 4}).model_dump(mode="json")
    content |= {"name": "d", "adapter": {"method": "dora", "r": 4}}
    result: Any = train(parse_recipe(content), store=AdapterStore(tmp_path / "store"), progress=False)  # type: ignore[arg-type]
    made = convert(Path(result.path), tmp_path / "whole", name="w", base=bases["causal_lm"], rank=128)
    low = convert(tmp_path / "whole", tmp_path / "low", name="l", base=bases["causal_lm"], rank=made.exact_rank - 1)
    cards = [(tmp_path / name / "README.md").read_text() for name in ("whole", "low")]
    for card, rank, need in zip(
        cards, (made.rank, low.rank), ("an exact copy.", f"an exact copy needs rank {made.exact_rank}."), strict=True
    ):
        assert f"| {result.metrics['adapter']['bits_per_character']:.4f} |" in card
        assert f"Measured on d (dora), before it was converted to LoRA of rank {rank}; {need}" in card
    assert "Measured on" not in (Path(result.path) / "README.md").read_text()


def test_the_certificate_tells_what_a_smaller_rank_lost(adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, base = adapter("lora", r=8)
    exact = convert(folder, tmp_path / "exact", name="x", base=base)
    smaller = convert(folder, tmp_path / "small", name="x", base=base, rank=exact.exact_rank - 1)
    assert (smaller.exact, exact.exact) == (False, True)
    assert exact.error < 1e-4 < smaller.error
    assert exact.probes < smaller.probes <= smaller.tolerance
    monkeypatch.setattr("embedft.convert.MAX_RANK", exact.exact_rank - 1)
    assert convert(folder, tmp_path / "bounded", name="x", base=base).rank == smaller.rank, "no more than a server takes"
    assert convert(folder, tmp_path / "asked", name="x", base=base, rank=exact.exact_rank).exact, "unless it is asked for"


@pytest.mark.parametrize(("method", "quantization"), [(name, "none") for name in CHOSEN if name not in QUANTIZED] + [("qlora", "nf4")])
def test_merging_writes_a_model_that_answers_as_the_adapter_does(
    adapter: Any, bases: dict[str, Path], method: str, quantization: str, tmp_path: Path
) -> None:
    import torch

    folder, base = adapter(method, quantization)
    if not METHODS[method].merges:
        with pytest.raises(MethodUnsupported, match="no change of weights"):
            merge(folder, tmp_path / "out", base=bases["causal_lm"])
        return
    merged = merge(folder, tmp_path / "out", base=bases["causal_lm"])
    model = load_model(tmp_path / "out", task="causal_lm")
    if quantization == "none":
        assert torch.allclose(logits(model), logits(load_adapter(load_model(base, task="causal_lm"), folder)), atol=1e-3)
        assert merged.error < 1e-3
    else:  # what it was trained to make good is no longer there
        assert 1e-3 < merged.error < 1


@pytest.mark.parametrize("quantization", ["nf4", "int8", "w8a8"])
def test_a_base_that_came_quantized_is_merged_as_the_weights_that_it_stands_for(adapter: Any, quantization: str, tmp_path: Path) -> None:
    import torch

    from embedft.model_folder import describe

    folder, base = adapter("lora", quantization)
    assert merge(folder, tmp_path / "out", base=base).error < 0.02, "NF4's scales are in bf16, and so are the weights made of them"
    assert describe(tmp_path / "out").quantization == "none"
    merged, apart = load_model(tmp_path / "out", task="causal_lm"), load_adapter(load_model(base, task="causal_lm"), folder)
    assert torch.dist(logits(merged), logits(apart)) < 0.02 * logits(apart).norm()


def test_an_adapted_head_is_merged_beside_the_input_embedding_that_it_shared(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = published(tmp_path / "head", bases["causal_lm"], "lora", targets=["lm_head"])
    assert merge(folder, tmp_path / "out", base=bases["causal_lm"]).error < 1e-3
    model = load_model(tmp_path / "out", task="causal_lm")
    assert not model.config.tie_word_embeddings


def test_a_merged_model_can_be_quantized_and_holds_its_tokenizer(adapter: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    from embedft.model_folder import RECORD, describe, read_json

    folder, _ = adapter("lora")
    merge(folder, tmp_path / "out", base=bases["causal_lm"], scheme="nf4")
    assert describe(tmp_path / "out").quantization == "nf4"
    assert read_json(tmp_path / "out" / RECORD)["source"] == f"{bases['causal_lm'].name}+{read_passport(folder).name}"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with pytest.raises(UsageError, match="not empty"):
        merge(folder, tmp_path / "out", base=bases["causal_lm"])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        merge(folder, tmp_path / "file", base=bases["causal_lm"])


@pytest.mark.parametrize("scheme", ["nf4", "w8a8"])
def test_a_merge_that_is_quantized_says_how_far_that_took_it(adapter: Any, bases: dict[str, Path], tmp_path: Path, scheme: str) -> None:
    """Read off the written folder itself: what it answers on the probes against what the adapter answered there."""
    folder, base = adapter("lora")
    made = merge(folder, tmp_path / "out", base=bases["causal_lm"], scheme=scheme)
    recorded = read_probes(folder)
    plain, packed = (
        outputs(load_model(at, task="causal_lm"), recorded.probes, folder=at, settings=None) for at in (base, tmp_path / "out")
    )
    lost = [one - other - effect for one, other, effect in zip(packed, plain, recorded.effect, strict=True)]
    size = sum(float((each**2).sum()) for each in lost) ** 0.5 / recorded.strength
    assert made.error < 1e-3
    assert made.quantized_error == pytest.approx(size, rel=0.05)
    assert size > 10 * made.error
    assert merge(folder, tmp_path / "whole", base=bases["causal_lm"]).quantized_error is None


@pytest.mark.parametrize(("own", "named"), [(True, "plain"), (False, "chatml"), (True, None)])
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_merged_model_is_asked_as_the_adapter_was_trained(tmp_path: Path, own: bool, named: str | None, scheme: str | None) -> None:
    base = tiny_llama(tmp_path / "base", layers=1, template=own)
    if own and scheme is None:  # as many a base has it, in its tokenizer's config
        config = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": own_template(base)}))
        (base / "chat_template.jinja").unlink()
    content = planted_recipe(tmp_path, base, test_rows=0, train={"max_steps": 2}).model_dump(mode="json")
    content["data"]["template"] = named
    store = AdapterStore(tmp_path / "store")
    result: Any = train(parse_recipe(content), store=store, progress=False)  # type: ignore[arg-type]
    merge(Path(result.path), tmp_path / "out", base=base, scheme=scheme)
    learnt = store.passport(result.name).template_hash
    assert template_hash(own_template(tmp_path / "out")) == learnt
    rendered = tokenizer_of(tmp_path / "out").chat_template
    assert template_hash(rendered) == learnt, "as transformers reads the folder"


def test_nothing_is_merged_into_another_base_of_the_same_shapes(adapter: Any, tmp_path: Path) -> None:
    folder, _ = adapter("lora")
    with pytest.raises(BaseMismatch):
        merge(folder, tmp_path / "out", base=tiny_llama(tmp_path / "other", layers=1, seed=5))
    assert not (tmp_path / "out").exists()


def imported(folder: Path, base: Path, **features: Any) -> Path:
    """An adapter that PEFT itself made, with the passport and probes of an import."""
    store = AdapterStore(folder / "store")
    import_unproven(store, featured_adapter(folder / "made", base, seed=3, **features), name="theirs", base=str(base), task="causal_lm")
    return store.folder("theirs")


@pytest.mark.parametrize(
    ("features", "match"),
    [
        ({"bias": "lora_only"}, r"'theirs' cannot be used: it changes biases of the base too \(bias: lora_only\)"),
        ({"modules_to_save": ["lm_head"]}, r"more than weights of linear layers \(modules_to_save: lm_head\)"),
        ({"trainable_token_indices": [5, 6]}, r"trainable_token_indices: 5, 6"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}, "target_parameters: mlp.up_proj.weight"),
    ],
)
def test_what_a_lora_would_lose_of_an_adapter_keeps_it_from_becoming_one(
    bases: dict[str, Path], tmp_path: Path, features: dict[str, Any], match: str
) -> None:
    base = bases["causal_lm"]
    folder = imported(tmp_path, base, **features)
    with pytest.raises(AdapterInvalid, match=match):
        convert(folder, tmp_path / "lora", name="x", base=base)
    with pytest.raises(AdapterInvalid, match=match):
        combine([folder, folder], tmp_path / "sum", name="x", weights=[1, 1], base=base)


def test_of_chosen_layers_those_are_converted(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", layers=2)
    folder = imported(tmp_path, base, layers_to_transform=[1], exclude_modules=["o_proj"])
    assert convert(folder, tmp_path / "out", name="x", base=base).exact
    original, plain = (load_adapter(load_model(base, task="causal_lm"), each) for each in (folder, tmp_path / "out"))
    assert [name for name, _ in lora_layers(original)] == [name for name, _ in lora_layers(plain)]


def test_what_peft_cannot_merge_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = imported(tmp_path, bases["causal_lm"], lora_bias=True)
    with pytest.raises(AdapterInvalid, match=r"'theirs' cannot be used: PEFT cannot write it into the base's weights \(.*bias"):
        merge(folder, tmp_path / "merged", base=bases["causal_lm"])


def test_the_command_line_converts_merges_and_combines(adapter: Any, bases: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    from embedft.adapters.transfer import import_folder
    from embedft.cli import main

    folder, base = adapter("vera")
    import_folder(AdapterStore(tmp_path / "store"), folder, name="vera")
    common = ["--adapters", str(tmp_path / "store"), "--base", str(base), "--json"]
    assert main(["adapters", "convert", "vera", "--to", "lora", *common]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["exact"]) == ("vera-lora", True)
    assert main(["adapters", "combine", "double", "vera-lora", "vera-lora", "--weights", "1", "1", *common]) == 0
    assert json.loads(capsys.readouterr().out)["r"] == 2 * said["rank"]
    assert main(["adapters", "merge", "vera-lora", str(tmp_path / "merged"), *common]) == 0
    assert (tmp_path / "merged" / "config.json").is_file()
    assert sorted(AdapterStore(tmp_path / "store").names()) == ["double", "vera", "vera-lora"]
