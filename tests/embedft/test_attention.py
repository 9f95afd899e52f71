"""Attention over packed rows, compiled and by torch: the textbook's numbers and gradients, and nothing that depends on neighbours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedft import attention, native
from embedft.attention import Groups

MIXED = [(3, 1), (2, 5), (4, 17), (2, 33), (1, 64), (1, 150)]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setenv(native.OFF, "0")
    assert attention.kernels() == request.param, "this machine has a compiler"
    return request.param


def rows(groups: Groups, heads: int, size: int, dtype: torch.dtype, *, beyond: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, 3·d) and a gradient (T, d), `beyond` rows of no text included."""
    torch.manual_seed(len(groups) + heads + size)
    total = sum(texts * length for texts, length in groups) + beyond
    return torch.randn(total, 3 * heads * size).to(dtype), torch.randn(total, heads * size).to(dtype)


def textbook(qkv: torch.Tensor, grad: torch.Tensor, groups: Groups, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, a text at a time, its gradient by autograd."""
    given = qkv.double().requires_grad_()
    made, start = torch.zeros(grad.shape, dtype=torch.float64), 0
    for length in (length for texts, length in groups for _ in range(texts)):
        q, k, v = (part.view(length, heads, -1).transpose(0, 1) for part in given[start : start + length].chunk(3, dim=1))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
        made[start : start + length] = (scores.softmax(2) @ v).transpose(0, 1).reshape(length, -1)
        start += length
    made[:start].backward(grad[:start].double())
    assert given.grad is not None
    return made.detach(), given.grad


def both(qkv: torch.Tensor, grad: torch.Tensor, groups: Groups, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    made, sums = attention.attention(qkv, groups, heads)
    return made, attention.attention_backward(grad, qkv, made, sums, groups, heads)


def off_by(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(("heads", "size"), [(12, 32), (3, 64), (2, 96), (1, 128), (4, 16), (2, 80)])
def test_it_is_the_textbook_s(dtype: torch.dtype, bound: float, heads: int, size: int) -> None:
    qkv, grad = rows(MIXED, heads, size, dtype)
    made, dqkv = both(qkv, grad, MIXED, heads)
    exact, dexact = textbook(qkv, grad, MIXED, heads)
    assert made.dtype == dqkv.dtype == dtype
    assert off_by(made, exact) <= bound
    assert off_by(dqkv, dexact) <= bound


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 70)), min_size=1, max_size=5),
    st.integers(0, 9),
    st.sampled_from([(torch.float32, 1e-6), (torch.bfloat16, 8e-3)]),
)
def test_texts_of_any_lengths_and_rows_of_none(groups: list[tuple[int, int]], beyond: int, how: tuple[torch.dtype, float]) -> None:
    dtype, bound = how
    qkv, grad = rows(groups, 2, 32, dtype, beyond=beyond)
    qkv[len(qkv) - beyond :] = torch.nan
    made, dqkv = both(qkv, grad, groups, 2)
    exact, dexact = textbook(qkv, grad, groups, 2)
    assert off_by(made, exact) <= bound
    assert torch.linalg.norm(dqkv.double() - dexact) <= bound * max(float(dexact.norm()), 1)
    assert not made[len(made) - beyond :].any()
    assert not dqkv[len(made) - beyond :].any()


def test_a_text_s_numbers_are_the_same_to_the_bit_whoever_stands_beside_it_and_whatever_the_threads() -> None:
    qkv, grad = rows(MIXED, 4, 32, torch.bfloat16)
    made, dqkv = both(qkv, grad, MIXED, 4)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for one, other in zip(both(qkv, grad, MIXED, 4), (made, dqkv), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)
    alone = both(qkv[-150:].contiguous(), grad[-150:].contiguous(), [(1, 150)], 4)
    assert torch.equal(alone[0], made[-150:])
    assert torch.equal(alone[1], dqkv[-150:])


def test_scores_of_any_size_and_numbers_that_are_none() -> None:
    qkv, grad = rows([(2, 20)], 2, 32, torch.float32)
    qkv[:, :128] *= 40  # scores of some thousand: one key takes all, and e to them is no float
    made, dqkv = both(qkv, grad, [(2, 20)], 2)
    exact, dexact = textbook(qkv, grad, [(2, 20)], 2)
    assert off_by(made, exact) <= 1e-4
    assert off_by(dqkv, dexact) <= 1e-3
    for nan in (0x7FC00000, 0x7F8001FF, -0x00000155):  # as hardware makes it, and of other bits
        qkv[3, 5] = torch.tensor(nan, dtype=torch.int32).view(torch.float32)
        made, dqkv = both(qkv, grad, [(2, 20)], 2)
        assert made[3, :32].isnan().all()  # the first text's first head
        assert dqkv[:20, :32].isnan().any()
        assert not made[20:].isnan().any()
        assert not dqkv[20:].isnan().any()


def test_what_the_compiled_way_cannot_do_torch_does(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    loaded = attention._loaded
    monkeypatch.setattr(attention, "_loaded", lambda qkv, heads: asked.append((found := loaded(qkv, heads)) is not None) or found)
    for heads, size in ((2, 32), (2, 48), (2, 16)):
        both(*rows([(1, 9)], heads, size, torch.float32), [(1, 9)], heads)
    both(*rows([(1, 9)], 2, 32, torch.float64), [(1, 9)], 2)
    assert asked == [way == "compiled", way == "compiled", *[False] * 6]
