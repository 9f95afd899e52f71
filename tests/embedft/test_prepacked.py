"""Linear layers by oneDNN: the product that torch makes, of weights as they lie and laid out, whatever is added to it."""

import pytest
import torch

from embedft.prepacked import FEW_ROWS, OneDnnLinear, Prepacked, affine, by_onednn, usable


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("shape", [(1, 384, 1536), (70, 96, 33), (400, 32, 32)])
def test_it_is_the_product(dtype: torch.dtype, bound: float, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    rows, width, out = shape
    x, weight, bias, plus = (torch.randn(*size).to(dtype) for size in ((rows, width), (out, width), (out,), (rows, out)))
    assert usable(weight)
    packed = Prepacked(weight)
    back = Prepacked(weight.t())
    before, exact = plus.clone(), x.double() @ weight.double().t()
    for given, more in ((None, None), (bias, None), (None, plus), (bias, plus)):
        wanted = exact + (0 if given is None else given.double()) + (0 if more is None else more.double())
        lying = [affine(x, way, given, plus=more) for way in (weight, weight.t().contiguous().t())]
        for made in (packed(x, given, plus=more), *lying):
            assert made.dtype == dtype
            assert float((made.double() - wanted).norm() / wanted.norm()) <= bound
    assert torch.equal(plus, before), "what is added stays as it was"
    assert float((back(plus).double() - plus.double() @ weight.double()).norm() / exact.norm()) <= 10 * bound


def test_what_onednn_has_no_layout_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not usable(torch.zeros(4, 4, dtype=torch.float64))
    assert not usable(torch.zeros(4, 4, dtype=torch.int8))
    assert not usable(torch.zeros(4))
    assert not usable(torch.zeros(4, 4, device="meta"))
    monkeypatch.setattr("embedft.prepacked._has_bf16", lambda: False)  # as on a processor without AVX512
    weight = torch.randn(4, 6).bfloat16()
    assert not usable(weight)
    assert affine(torch.zeros(2, 6).bfloat16(), weight, None).shape == (2, 4)
    by_onednn(layer := torch.nn.Linear(6, 4).bfloat16().requires_grad_(False))
    assert type(layer) is torch.nn.Linear


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_a_frozen_model_infers_as_before_and_still_gives_gradients(rows: int, dtype: torch.dtype, bound: float) -> None:
    model = (
        torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.GELU(), torch.nn.Linear(64, 40, bias=False)).to(dtype).requires_grad_(False)
    )
    trained = torch.nn.Linear(40, 8).to(dtype)
    x = torch.randn(2, rows, 48).to(dtype)
    with torch.inference_mode():
        before = model(x)
    by_onednn(torch.nn.ModuleList([model, trained]))
    with torch.inference_mode():
        made = model(x)
        assert model(x[:, :0]).shape == (2, 0, 40)
    assert made.shape == before.shape == (2, rows, 40)
    assert float((made - before).norm() / before.norm()) <= bound
    assert [type(layer) for layer in (model[0], model[2], trained)] == [OneDnnLinear, OneDnnLinear, torch.nn.Linear]
    assert model[0].laid_out is not None
    x.requires_grad_()
    trained(model(x)).sum().backward()
    assert x.grad is not None
    assert trained.weight.grad is not None


def test_without_much_memory_no_weight_is_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedft.prepacked.SHARE", 0)
    layer = torch.nn.Linear(48, 64).requires_grad_(False)
    by_onednn(layer)
    assert isinstance(layer, OneDnnLinear)
    assert layer.laid_out is None
