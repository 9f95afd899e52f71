"""What a method cannot be asked for is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from embedft.methods import METHODS, attach
from tests.embedft.methods.cells import cell, small


def test_an_unknown_option_or_method_is_named(llama: Path, tmp_path: Path) -> None:
    from embedft.errors import MethodUnsupported

    with pytest.raises(MethodUnsupported, match="its options are: ratio"):
        cell(tmp_path, llama, "causal_lm", "lora_plus", "none", options={"rate": 3})
    with pytest.raises(MethodUnsupported, match="did you mean 'lora_plus'"):
        cell(tmp_path, llama, "causal_lm", "LoRA-plus", "none")


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("adalora", {"every": 0}, "a whole number of at least 1"),
        ("adalora", {"warm": 2.0}, "a number from 0 to 0.9"),
        ("adalora", {"init_r": 2}, "ranks only fall"),
        ("delta_lora", {"begin": 3}, "a number from 0 to 1"),
        ("eva", {"rho": 0.5}, "of at least 1"),
        ("lora_plus", {"ratio": -4}, "of at least 1"),
        ("multitask_prompt_tuning", {"ranks": 0}, "of at least 1"),
    ],
)
def test_an_option_that_would_make_it_another_method_is_refused(
    llama: Path, tmp_path: Path, method: str, options: dict[str, Any], expected: str
) -> None:
    from embedft.errors import MethodUnsupported

    with pytest.raises(MethodUnsupported, match=expected):
        cell(tmp_path, llama, "causal_lm", method, "none", options=options)


def test_a_decoder_without_linear_layers_is_known_for_one_and_refused_with_what_to_do(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from embedft.base import BaseSpec, load_base
    from embedft.errors import MethodUnsupported
    from embedft.recipe import AdapterSection
    from tests.fixtures_lm import tiny_tokenizer

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=400)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = load_base(BaseSpec(str(tmp_path)), task="causal_lm")
    assert base.info.kind == "decoder"
    with pytest.raises(MethodUnsupported, match=r"are convolutions.*method=full"):
        attach(base, AdapterSection(), task="causal_lm")


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.quantizations[0] == "none"])
def test_rank_dropout_targets_and_alpha_are_there_or_refused_as_the_table_says(llama: Path, method: str) -> None:
    """The table's columns against what PEFT then holds."""
    from dataclasses import replace

    from embedft.base import BaseSpec, load_base
    from embedft.errors import MethodUnsupported
    from embedft.recipe import AdapterSection, EmbeddingAdapterSection

    row, base = METHODS[method], load_base(BaseSpec(str(llama)), task="causal_lm")
    plain = AdapterSection(**small(method))
    batch = [{"input_ids": torch_ids(), "attention_mask": torch_ids().ne(-1)}]
    if not row.rank:
        with pytest.raises(MethodUnsupported, match=r"leave adapter\.r out"):
            attach(base, plain.model_copy(update={"r": 4}), task="causal_lm")
    if not row.dropout:
        with pytest.raises(MethodUnsupported, match=r"set adapter\.dropout=0"):
            attach(base, plain.model_copy(update={"dropout": 0.25}), task="causal_lm")
    if not row.targets:
        with pytest.raises(MethodUnsupported, match=r"leave adapter\.targets out"):
            attach(base, plain.model_copy(update={"targets": ("q_proj",)}), task="causal_lm")
        with pytest.raises(MethodUnsupported, match=r"leave adapter\.layers out"):
            attach(base, EmbeddingAdapterSection(method=method, layers=1), task="causal_lm")
    if not row.alpha:
        with pytest.raises(MethodUnsupported, match=r"leave adapter\.alpha out"):
            attach(base, plain.model_copy(update={"alpha": 12}), task="causal_lm")
    chosen: dict[str, Any] = ({"dropout": 0.25} if row.dropout else {}) | ({"targets": ("q_proj",)} if row.targets else {})
    chosen |= {"alpha": 12} if row.alpha else {}
    model: Any = attach(replace(base), plain.model_copy(update=chosen), task="causal_lm", batches=batch)
    if row.targets:
        trained = [name for name, value in model.named_parameters() if value.requires_grad]
        assert trained
        assert all("q_proj" in name or "vera_" in name for name in trained)
    config = model.peft_config["default"]
    if row.alpha:
        assert 12 in (getattr(config, "lora_alpha", None), getattr(config, "alpha", None))
    if row.dropout:
        given = [getattr(config, name) for name in ("lora_dropout", "vera_dropout", "module_dropout") if hasattr(config, name)]
        assert given == [0.25]


def torch_ids() -> Any:
    import torch

    return torch.arange(40, 56)[None]
