"""GPTQ and AWQ folders, as they come: read exactly, trained on, verified, merged; refused where they are laid out otherwise."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from embedft.base import BaseSpec, load_base, load_model
from embedft.encode import Encoder
from embedft.errors import BaseError, QuantizationUnsupported
from embedft.merge import merge
from embedft.model_folder import describe
from embedft.vectors import published_settings
from embedft.verify import verify
from tests.embedft.methods.published import published
from tests.fixtures_lm import tiny_llama
from tests.fixtures_packed import packed_copy

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("gptq", {}),
    ("gptq", {"bits": 8, "group": 64}),
    ("gptq", {"bits": 2, "sym": False}),
    ("gptq", {"sym": False, "by_activation": True}),
    ("awq", {"sym": False}),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("packed") / "base", layers=1)


def changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("method", "kind"), KINDS)
def test_a_packed_folder_loads_as_the_weights_it_stands_for(source: Path, tmp_path: Path, method: str, kind: dict[str, Any]) -> None:
    import torch

    weights = packed_copy(source, tmp_path / "packed", method, **kind)
    if not kind:
        (tmp_path / "packed" / "model.safetensors").rename(tmp_path / "packed" / "model-00001-of-00001.safetensors")
    assert describe(tmp_path / "packed").quantization == method
    model: Any = load_model(tmp_path / "packed", task="causal_lm", dtype=torch.float32)
    full = load_model(source, task="causal_lm", dtype=torch.float32)
    assert len(weights) == 7
    for name, weight in full.named_parameters():
        assert torch.equal(model.get_parameter(name), weights.get(name, weight)), name
    assert model.name_or_path == str(tmp_path / "packed")


def test_gptq_v2_says_zeros_as_they_are_and_a_layer_may_have_other_bits_than_its_config(source: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    four, eight = (packed_copy(source, tmp_path / str(bits), "gptq", bits=bits) for bits in (4, 8))
    mixed, path = load_file(tmp_path / "4" / "model.safetensors"), tmp_path / "4" / "model.safetensors"
    layer = "model.layers.0.mlp.up_proj"
    mixed |= {name: tensor for name, tensor in load_file(tmp_path / "8" / "model.safetensors").items() if name.startswith(layer)}
    save_file({name: tensor + _ones(tensor, name, layer) for name, tensor in mixed.items()}, path, metadata={"format": "pt"})
    changed(tmp_path / "4", checkpoint_format="gptq_v2")
    model = load_model(tmp_path / "4", task="causal_lm", dtype=torch.float32)
    assert torch.equal(model.get_parameter(f"{layer}.weight"), eight[f"{layer}.weight"])
    assert torch.equal(model.get_parameter("model.layers.0.mlp.down_proj.weight"), four["model.layers.0.mlp.down_proj.weight"])


def _ones(tensor: Any, name: str, layer: str) -> Any:
    """What makes a v1 zero, which is stored less one, a v2 zero: one more in each of a word's codes."""
    return (0x01010101 if name.startswith(layer) else 0x11111111) if name.endswith("qzeros") else 0 * tensor


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_adapter_trains_on_a_packed_base_passes_its_probes_and_merges(source: Path, tmp_path: Path, method: str) -> None:
    base = tmp_path / "packed"
    packed_copy(source, base, method)
    adapter = published(tmp_path / "a", base, "lora")
    assert verify(adapter, base=base).passed
    merged = merge(adapter, tmp_path / "merged", base=base)
    assert merged.error < 0.01
    assert describe(tmp_path / "merged").quantization == "none"


def test_an_embedder_that_comes_packed_makes_the_vectors_of_its_weights(source: Path, tmp_path: Path) -> None:
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    weights = packed_copy(source, tmp_path / "packed", "gptq")
    shutil.copytree(source, tmp_path / "plain")
    path = tmp_path / "plain" / "model.safetensors"
    save_file(load_file(path) | {name: weight.contiguous() for name, weight in weights.items()}, path, metadata={"format": "pt"})
    made = []
    for folder in (tmp_path / "packed", tmp_path / "plain"):
        base = load_base(BaseSpec(str(folder)), task="embedding")
        made.append(Encoder(base.model, folder, published_settings(base.info, 32)).encode(["what is red?", "green mean go"]))
        assert all(parameter.dtype == base.model.dtype for parameter in base.model.parameters() if parameter.dtype != torch.float32)
    np.testing.assert_allclose(made[0], made[1], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "said", "match"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "gptq of 4 bits laid out for marlin"),
        ("gptq", {"bits": 3}, "gptq of 3 bits"),
        ("awq", {"version": "gemv"}, "awq of 4 bits laid out for gemv"),
    ],
)
def test_another_layout_is_refused_by_its_name(source: Path, tmp_path: Path, method: str, said: dict[str, Any], match: str) -> None:
    packed_copy(source, tmp_path / "packed", method)
    changed(tmp_path / "packed", **said)
    with pytest.raises(QuantizationUnsupported, match=match):
        load_model(tmp_path / "packed", task="causal_lm")


def test_words_of_another_size_and_a_config_that_says_nothing_of_them_are_named(source: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    packed_copy(source, tmp_path / "packed", "gptq")
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.short() if "qweight" in name else tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(QuantizationUnsupported, match=r"is packed in torch\.int16"):
        load_model(tmp_path / "packed", task="causal_lm", dtype=torch.float32)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    with pytest.raises(BaseError, match=r"packed \(qweight\), and its config\.json has no quantization_config"):
        load_model(tmp_path / "packed", task="causal_lm", dtype=torch.float32)


def test_a_packed_layer_that_is_half_there_is_named(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    packed_copy(source, tmp_path / "packed", "gptq")
    path = tmp_path / "packed" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if name != "model.layers.0.mlp.up_proj.scales"}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"model\.layers\.0\.mlp\.up_proj lacks scales"):
        load_model(tmp_path / "packed", task="causal_lm")
