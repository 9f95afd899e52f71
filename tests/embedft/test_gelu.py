"""GELU and its slope, compiled and by torch: of any number, of both dtypes, in blocks of any size."""

import math

import pytest
import torch

from embedft import gelu, native


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setenv(native.OFF, "0")
    assert (gelu._compiled() is None) == (request.param == "torch"), "this machine has a compiler"


def textbook(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, by the complement of the error function: without it small results are what is left of 1 - 1."""
    x = x.double()
    share = torch.special.erfc(-x / math.sqrt(2)) / 2
    return x * share, share + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_it_is_the_textbook_s(dtype: torch.dtype, bound: float) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4])]).to(dtype)
    for found, exact in zip(gelu.gelu(x, sloped=True), textbook(x), strict=True):
        assert found is not None
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= bound * exact.abs().clamp(min=1)).all()


@pytest.mark.parametrize("count", [1, 15, 16, 255, 256, 257, 5000])
def test_every_number_by_itself_and_the_slope_only_if_asked_for(count: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    made, slope = gelu.gelu(x, sloped=True)
    assert slope is not None
    assert torch.equal(gelu.gelu(x, sloped=False)[0], made)
    assert gelu.gelu(x, sloped=False)[1] is None
    for found, exact in zip((made, slope), textbook(x), strict=True):
        assert float((found - exact).abs().max()) <= 1e-6


def test_what_is_no_number_stays_none_and_touches_no_other() -> None:
    for found in gelu.gelu(torch.tensor([math.nan, 3.0]), sloped=True):
        assert found is not None
        assert found.isnan().tolist() == [True, False]
