"""The packed path: the ordinary forward's numbers and gradients, what is computed only once, and what cannot run so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from embedft import unpadded
from embedft.base import Base, BaseSpec, load_base
from embedft.embedding.fast import PackedModel, Texts
from embedft.embedding.packed import PackedEncoder, unpackable
from embedft.encode import Encoder, EncodeSettings, TextPreparer, finish, pad, pool
from embedft.methods import attach
from embedft.recipe import EmbeddingAdapterSection
from embedft.training.arguments import OPTIMIZERS
from tests.embedft.embedding.runs import Make
from tests.fixtures_embedding import text, tiny_decoder, tiny_encoder

TEXTS = [text("document", i, i) + " " + text("query", 2 * i, i) * (i % 3) for i in range(8)] + [text("query", 3, 3)]
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


def adapted(folder: Path | str, *, quantization: str = "none", **adapter: Any) -> tuple[Base, Any]:
    """A base with an adapter whose B is not zero."""
    base = load_base(BaseSpec(str(folder), quantization), task="embedding")
    torch.manual_seed(3)
    model = attach(base, EmbeddingAdapterSection(**({"r": 4} | adapter)), task="embedding")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return base, model


def ids_of(base: Base, settings: EncodeSettings) -> list[list[int]]:
    return TextPreparer(base.folder, settings).prepare(TEXTS).ids


def gradients(model: Any, vectors: torch.Tensor) -> Gradients:
    model.zero_grad()
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: Gradients, other: Gradients, *, tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert torch.linalg.norm(gradient - other[name]) <= tolerance * torch.linalg.norm(gradient), name


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("adapter", [{}, {"targets": ("query", "value")}, {"layers": 1}, {"method": "rslora", "r": 8}])
def test_vectors_and_gradients_are_those_of_the_padded_forward(quantization: str, adapter: dict[str, Any], root: Path) -> None:
    for pooling in ("mean", "cls"):
        folder = tiny_encoder(root / f"{pooling}-{quantization}-{len(str(adapter))}", pooling=pooling)
        base, model = adapted(folder, quantization=quantization, **adapter)
        settings = EncodeSettings(pooling, True, 16)  # type: ignore[arg-type]
        ids = ids_of(base, settings)
        input_ids, mask = pad(ids)
        padded = finish(pool(model(input_ids=input_ids, attention_mask=mask).last_hidden_state, mask, settings.pooling), settings)
        packed = PackedEncoder(model, settings)
        assert packed.first_adapted == (1 if "layers" in adapter else 0)
        vectors = packed.encode(ids)
        assert torch.allclose(vectors, padded, atol=2e-6)
        assert_same(gradients(model, padded), gradients(model, vectors))
        below = packed.lower(ids)
        assert_same(gradients(model, packed.encode(ids)), gradients(model, packed.encode(ids, below)))


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_what_fills_a_bf16_batch_up_is_seen_by_no_text(pooling: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedft.embedding.packed.SHAPES", 1)  # filled up to a power of two
    base, model = adapted(tiny_encoder(root / f"filled-{pooling}", pooling="mean"))
    settings = EncodeSettings(pooling, True, 16)  # type: ignore[arg-type]
    ids, packed = ids_of(base, settings)[1:], PackedEncoder(model, settings)
    plain, below = packed.encode(ids), packed.lower(ids)
    expected = gradients(model, plain)
    packed.dtype = torch.bfloat16  # and so filled, in float32
    assert len(packed._filled(torch.zeros(sum(map(len, ids)), 64))) > sum(map(len, ids))
    for vectors in (packed.encode(ids), packed.encode(ids, below)):
        assert torch.allclose(vectors, plain, atol=2e-6)
        assert_same(gradients(model, vectors), expected)
    assert all(torch.allclose(one, other, atol=2e-6) for one, other in zip(packed.lower(ids), below, strict=True))


def test_a_roberta_counts_its_positions_from_after_the_padding(root: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    folder = tiny_encoder(root / "roberta", pooling="mean")
    config = RobertaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        initializer_range=0.2, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    model = RobertaModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    _, model = adapted(folder)
    settings = EncodeSettings("mean", True, 16)
    ids = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
    input_ids, mask = pad(ids)
    padded = pool(model(input_ids=torch.where(mask > 0, input_ids, 1), attention_mask=mask).last_hidden_state, mask, "mean")
    assert torch.allclose(PackedEncoder(model, settings).encode(ids), finish(padded, settings), atol=2e-6)


def test_an_optimizer_step_is_seen_and_so_is_the_adapter_being_off(root: Path) -> None:
    base, model = adapted(tiny_encoder(root / "step", pooling="mean"))
    settings = EncodeSettings("mean", True, 16)
    ids, packed = ids_of(base, settings), PackedEncoder(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = packed.encode(ids)
    gradients(model, before)
    optimizer.step()
    encoder = Encoder(model, base.folder, settings)
    after = packed.encode(ids).detach()
    assert torch.allclose(after, torch.tensor(encoder.encode(TEXTS)), atol=2e-6)
    assert not torch.allclose(after, before, atol=1e-3)
    with packed.adapter_off(), torch.no_grad(), model.disable_adapter():
        assert torch.allclose(packed.encode(ids), torch.tensor(encoder.encode(TEXTS)), atol=2e-6)


@pytest.mark.parametrize(
    ("method", "quantization", "optimizer"),
    [("lora", "none", name) for name in OPTIMIZERS]
    + [("qlora", "nf4", "adamw"), ("lora_plus", "none", "adamw_8bit"), ("lora_fa", "none", "adamw")],
)
def test_training_runs_on_what_each_optimizer_wrote(method: str, quantization: str, optimizer: str, make: Make, tmp_path: Path) -> None:
    """bitsandbytes writes where autograd's version counter does not look."""
    from embedft.embedding.data import load_data
    from embedft.embedding.losses import LOSSES
    from embedft.embedding.train import make_trainer, plan_for, settings_for

    recipe = make(quantization=quantization, adapter={"method": method}, train={"max_steps": 2, "optimizer": optimizer})
    examples, _ = load_data(recipe.data, recipe.eval, scored=False)
    base = load_base(BaseSpec(recipe.base.model, quantization), task="embedding")
    model, settings = attach(base, recipe.adapter, task="embedding"), settings_for(recipe, base)
    plan = plan_for(examples, recipe, loss=LOSSES["mnrl"], model=model)
    trainer = make_trainer(model, base, settings, examples, recipe, plan=plan, output=tmp_path)
    trainer.train()
    with torch.no_grad():
        seen = trainer.model.encoder.encode(ids_of(base, settings))
    encoder = Encoder(model, base.folder, settings)
    assert torch.allclose(seen, torch.tensor(encoder.encode(TEXTS)), atol=2e-6)
    with model.disable_adapter():
        assert not torch.allclose(seen, torch.tensor(encoder.encode(TEXTS)), atol=1e-3)


def packed_model(base: Base, model: Any, *, side: str = "both", rematerialize: int | None = None) -> PackedModel:
    settings = EncodeSettings("mean", True, 16)
    ids = ids_of(base, settings)
    texts = Texts({"query": [ids[8], ids[8], ids[0]], "document": [ids[1], ids[2], ids[1]], "negative_1": [ids[3], ids[1], ids[4]]})
    return PackedModel(model, PackedEncoder(model, settings), texts, side=side, rematerialize=rematerialize)


def columns_of(packed: PackedModel) -> list[list[int]]:
    return list(packed.texts.columns.values())


def test_gradients_computed_again_in_pieces_are_the_plain_ones(root: Path) -> None:
    base, model = adapted(tiny_encoder(root / "again", pooling="mean"))
    plain, pieces = packed_model(base, model), packed_model(base, model, rematerialize=2)
    one = gradients(model, torch.cat(plain(columns_of(plain))))
    assert_same(one, gradients(model, torch.cat(pieces(columns_of(pieces)))), tolerance=1e-6)


def test_a_text_that_repeats_is_encoded_once_a_batch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = adapted(tiny_encoder(root / "once", pooling="mean"))
    packed = packed_model(base, model)
    seen: list[int] = []
    encode = packed.encoder.encode
    monkeypatch.setattr(packed.encoder, "encode", lambda ids, below=None: seen.append(len(ids)) or encode(ids, below))
    vectors = packed(columns_of(packed))
    assert seen == [6]
    assert torch.equal(vectors[1][0], vectors[1][2])
    assert torch.allclose(vectors[2][1], torch.tensor(Encoder(model, base.folder, packed.encoder.settings).encode(TEXTS))[1], atol=2e-6)


def test_documents_of_a_query_only_adapter_are_the_bases_and_are_encoded_once_a_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = adapted(tiny_encoder(root / "query", pooling="mean"))
    packed = packed_model(base, model, side="query")
    packed.prepare(range(len(packed.texts.ids)), root)
    seen: list[int] = []
    encode = packed.encoder.encode
    monkeypatch.setattr(packed.encoder, "encode", lambda ids, below=None: seen.append(len(ids)) or encode(ids, below))
    vectors = packed(columns_of(packed))
    assert seen == [2], "the two distinct queries"
    encoder = Encoder(model, base.folder, packed.encoder.settings)
    with model.disable_adapter():
        plain = torch.tensor(encoder.encode(TEXTS))
    assert torch.allclose(vectors[1], plain[[1, 2, 1]], atol=2e-6)
    assert not torch.allclose(vectors[0], plain[[8, 8, 0]], atol=1e-3)
    assert any(gradient.any() for gradient in gradients(model, vectors[0]).values())
    assert not any(gradient.any() for gradient in gradients(model, packed(columns_of(packed))[1]).values())


def test_states_below_the_adapted_layers_may_lie_in_a_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = adapted(tiny_encoder(root / "file", pooling="mean"), layers=1)
    in_memory, in_file = packed_model(base, model), packed_model(base, model)
    in_memory.prepare(range(len(in_memory.texts.ids)), root)
    monkeypatch.setattr("embedft.embedding.fast.MEMORY_BYTES", 0)
    in_file.prepare(range(len(in_file.texts.ids)), root)
    assert (root / "below.bin").stat().st_size == 4 * 64 * sum(len(ids) for ids in in_file.texts.ids)
    monkeypatch.setattr(in_file.encoder, "lower", lambda _: pytest.fail("computed again"))
    assert torch.equal(torch.cat(in_memory(columns_of(in_memory))), torch.cat(in_file(columns_of(in_file))))


def test_what_cannot_run_packed_says_why(root: Path) -> None:
    folder = tiny_encoder(root / "cannot", pooling="mean")
    assert unpackable(adapted(folder)[1]) is None
    assert "dropout" in str(unpackable(adapted(folder, dropout=0.1)[1]))
    assert "Linear8bitLt" in str(unpackable(adapted(folder, quantization="int8")[1]))
    assert "llama" in str(unpackable(adapted(tiny_decoder(root / "llama"))[1]))
    config = json.loads((folder / "config.json").read_text())
    for said, change in (("activation", {"hidden_act": "relu"}), ("architecture", {"is_decoder": True})):
        (folder / "config.json").write_text(json.dumps(config | change))
        base, model = adapted(folder)
        assert said in str(unpackable(model))
        assert unpadded.usable(base.model) == (said == "activation"), "there the model's own code computes all but attention"
