"""W4A16 and W8A8: the files that engines compute with are turned back exactly, and adapters train and verify on them."""

from pathlib import Path

import pytest

from embedft.base import BaseSpec, base_folder, load_base, load_model
from embedft.compressed import gptq, nearest
from embedft.errors import MethodUnsupported, QuantizationUnsupported
from embedft.methods import attach
from embedft.model_folder import describe, quantization_of
from embedft.quantize import quantize
from embedft.recipe import AdapterSection
from embedft.verify import verify
from tests.embedft.methods.published import published
from tests.fixtures_lm import planted_rows, tiny_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("compressed") / "base", layers=1)


@pytest.mark.parametrize(("scheme", "most"), [("w4a16", 0.15), ("w8a8", 0.01)])
def test_a_compressed_folder_loads_as_the_weights_it_stands_for(source: Path, scheme: str, most: float) -> None:
    import torch

    folder = base_folder(BaseSpec(str(source), scheme))
    assert quantization_of(folder) == scheme
    assert describe(folder).parent == describe(source).fingerprint
    full, loaded = load_model(source, task="causal_lm"), load_model(folder, task="causal_lm")
    assert dict(full.named_parameters()).keys() == dict(loaded.named_parameters()).keys()
    for name, weight in full.named_parameters():
        other = loaded.get_parameter(name)
        assert type(other) is torch.nn.Parameter
        error = float((weight - other).norm() / weight.norm())
        assert (0 < error < most) if "proj" in name else error == 0, name
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert files < 0.6 * sum(path.stat().st_size for path in source.glob("*.safetensors"))


def test_the_codes_are_those_that_compressed_tensors_itself_unpacks(source: Path) -> None:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import load_file

    weight = load_model(source, task="causal_lm").get_parameter("model.layers.0.mlp.up_proj.weight").float()
    codes, scales = nearest(weight, bits=4, group=128, dtype=torch.float32)
    tensors = load_file(base_folder(BaseSpec(str(source), "w4a16")) / "model.safetensors")
    packed = tensors["model.layers.0.mlp.up_proj.weight_packed"]
    assert torch.equal(unpack_from_int32(packed, 4, torch.Size(weight.shape)), codes)
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.weight_scale"], scales)
    restored = codes * scales.repeat_interleave(128, dim=1)
    assert torch.equal(
        load_model(base_folder(BaseSpec(str(source), "w4a16")), task="causal_lm").model.layers[0].mlp.up_proj.weight, restored
    )


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_a_decompressed_layer_passes_on_the_gradient_and_computes_with_its_weights_as_they_are(source: Path, scheme: str) -> None:
    import torch

    layer = load_model(base_folder(BaseSpec(str(source), scheme)), task="causal_lm").model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, requires_grad=True)
    out = layer(x)
    assert torch.equal(out, torch.nn.functional.linear(x, layer.weight))
    out.sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand_as(x), atol=1e-5)


def test_gptq_loses_less_of_a_layers_output_than_rounding_to_nearest() -> None:
    import torch

    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    inputs = torch.randn(2000, 32) @ torch.randn(32, 256) + 0.1 * torch.randn(2000, 256)
    lost: list[float] = []
    for codes, scales in (
        nearest(weight, bits=4, group=128, dtype=torch.float32),
        gptq(weight, inputs.T @ inputs, bits=4, group=128, dtype=torch.float32),
    ):
        restored = codes * scales.repeat_interleave(128, dim=1)
        lost.append(float((inputs @ (weight - restored).T).norm()))
    assert lost[1] < 0.7 * lost[0]


@pytest.mark.parametrize(("scheme", "method"), [("w4a16", "lora"), ("w8a8", "lora"), ("w4a16", "loftq")])
def test_an_adapter_trains_on_a_compressed_base_and_passes_its_probes_there(source: Path, tmp_path: Path, scheme: str, method: str) -> None:
    folder = published(tmp_path, source, method, scheme, max_steps=4)
    report = verify(folder, base=source)
    assert report.passed, report.reason
    assert report.error < 1e-3


def test_what_needs_the_full_weights_is_refused_there(source: Path) -> None:
    base = load_base(BaseSpec(str(source), "w4a16"), task="causal_lm")
    for method in ("pissa", "olora", "full", "qlora"):
        with pytest.raises(MethodUnsupported, match="on a base in w4a16"):
            attach(base, AdapterSection(method=method), task="causal_lm")


def test_calibration_rounds_by_gptq_and_is_for_w4a16_alone(source: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row["prompt"] for row in planted_rows(40)), encoding="utf-8")
    quantize(source, tmp_path / "gptq", scheme="w4a16", calibration=texts)
    by_rounding, by_gptq = describe(base_folder(BaseSpec(str(source), "w4a16"))), describe(tmp_path / "gptq")
    assert by_gptq.quantization == "w4a16"
    assert by_gptq.fingerprint != by_rounding.fingerprint
    with pytest.raises(QuantizationUnsupported, match="takes no calibration"):
        quantize(source, tmp_path / "other", scheme="nf4", calibration=texts)


@pytest.mark.parametrize("scheme", ["gptq", "awq"])
def test_gptqmodels_own_formats_are_not_written(source: Path, tmp_path: Path, scheme: str) -> None:
    with pytest.raises(QuantizationUnsupported, match=f"no scheme '{scheme}': gptq and awq folders are read and not written"):
        quantize(source, tmp_path / "out", scheme=scheme)


def test_columns_that_no_group_divides_are_refused(source: Path, tmp_path: Path) -> None:
    from tests.fixtures_embedding import tiny_encoder

    with pytest.raises(QuantizationUnsupported, match="use nf4 or int8"):
        quantize(tiny_encoder(tmp_path / "bert", pooling="mean"), tmp_path / "out", scheme="w4a16")
