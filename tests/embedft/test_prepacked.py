"""Linear layers by oneDNN: the product that torch makes, of weights as they lie and laid out, whatever is added to it."""

import pytest
import torch

from embedft.prepacked import Prepacked, affine, usable


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
        for made in (
            packed(x, given, plus=more),
            affine(x, weight, given, plus=more),
            affine(x, weight.t().contiguous().t(), given, plus=more),
        ):
            assert made.dtype == dtype
            assert float((made.double() - wanted).norm() / wanted.norm()) <= bound
    assert torch.equal(plus, before), "what is added stays as it was"
    assert float((back(plus).double() - plus.double() @ weight.double()).norm() / exact.norm()) <= 10 * bound


def test_what_onednn_has_no_layout_for_is_told() -> None:
    assert not usable(torch.zeros(4, 4, dtype=torch.float64))
    assert not usable(torch.zeros(4, 4, dtype=torch.int8))
    assert not usable(torch.zeros(4))
    assert not usable(torch.zeros(4, 4, device="meta"))
