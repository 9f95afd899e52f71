"""Texts end to end through transformers' model: the vectors of the padded forward, for any adapter that stands on its layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedft import native, unpadded
from embedft.base import BaseSpec, load_base
from embedft.encode import Encoder, EncodeSettings
from embedft.methods import attach
from embedft.recipe import EmbeddingAdapterSection
from tests.fixtures_embedding import text, tiny_decoder, tiny_encoder

TEXTS = [text("document", i, i) + " " + text("query", 2 * i, i) * (i % 4) for i in range(8)] + [text("query", 3, 3)]
ADAPTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "lora": {"method": "lora", "r": 4},
    "dora": {"method": "dora", "r": 4},
    "ia3": {"method": "ia3"},
    "vera": {"method": "vera", "r": 4},
}


def encoder(folder: Path, *, pooling: str = "mean", quantization: str = "none", adapter: dict[str, Any] | None = None) -> Encoder:
    base = load_base(BaseSpec(str(folder), quantization), task="embedding")
    model = base.model
    if adapter:
        torch.manual_seed(3)
        model = attach(base, EmbeddingAdapterSection(**adapter), task="embedding")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
    return Encoder(model, base.folder, EncodeSettings(pooling, True, 16))  # type: ignore[arg-type]


def padded(made: Encoder, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    with monkeypatch.context() as before:
        before.setattr(unpadded, "usable", lambda _: False)
        return made.encode(TEXTS, batch_size=4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_is_the_padded_forward(adapter: str, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder(tiny_encoder(tmp_path / "base", pooling="mean"), pooling=pooling, adapter=ADAPTERS[adapter])
    wanted = padded(made, monkeypatch)  # before attention is ours
    assert unpadded.usable(made.model)
    for found in (made.encode(TEXTS, batch_size=4), made.encode(TEXTS), padded(made, monkeypatch)):
        assert np.allclose(found, wanted, atol=2e-6)
    assert np.allclose(made.encode(TEXTS[3:4]), wanted[3:4], atol=2e-6)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_over_quantized_bases(quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder(tiny_encoder(tmp_path / "base", pooling="mean"), quantization=quantization, adapter=ADAPTERS["lora"])
    assert unpadded.usable(made.model)
    assert np.allclose(made.encode(TEXTS), padded(made, monkeypatch), atol=2e-5)


def test_a_roberta_and_what_fills_a_bf16_batch_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import RobertaConfig, RobertaModel

    folder = tiny_encoder(tmp_path / "roberta", pooling="mean")
    config = RobertaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        initializer_range=0.2, type_vocab_size=1, pad_token_id=0,
    )  # fmt: skip
    RobertaModel(config, add_pooling_layer=False).eval().save_pretrained(folder)
    made = encoder(folder)
    wanted = padded(made, monkeypatch)
    assert np.allclose(made.encode(TEXTS), wanted, atol=2e-6)
    monkeypatch.setattr(unpadded, "SHAPES", 1)  # filled up to a power of two
    made.model.to(torch.bfloat16)
    found = made.encode(TEXTS)
    assert (found * wanted).sum(1).min() > 0.999
    assert (found * padded(made, monkeypatch)).sum(1).min() > 0.9999


def test_a_model_that_would_mix_the_texts_is_told_of(tmp_path: Path) -> None:
    made = encoder(tiny_encoder(tmp_path / "base", pooling="mean"))
    assert unpadded.usable(made.model)
    forward = made.model.forward
    made.model.forward = lambda *args, texts=None, **named: forward(*args, **named)  # as one that forgets an argument
    with pytest.raises(RuntimeError, match="0 of 2 layers kept the texts apart"):
        made.encode(TEXTS)


def test_where_it_cannot_be_the_padded_forward_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_base(BaseSpec(str(tiny_decoder(tmp_path / "decoder"))), task="embedding").model
    assert not unpadded.usable(decoder)
    folder = tiny_encoder(tmp_path / "base", pooling="mean")
    made = encoder(folder, adapter={"method": "prompt_tuning", "r": 4})
    assert not unpadded.usable(made.model)
    with made.model.disable_adapter():  # then it is the base, to the bit
        assert unpadded.usable(made.model)
        assert np.array_equal(made.encode(TEXTS), encoder(folder).encode(TEXTS))
    eager = load_base(BaseSpec(str(folder)), task="embedding").model
    eager.set_attn_implementation("eager")
    assert not unpadded.usable(eager)
    plain = encoder(folder)
    monkeypatch.setenv(native.OFF, "0")
    assert not unpadded.usable(plain.model)
    assert plain.model.config._attn_implementation == "sdpa"
    plain.encode(TEXTS)
