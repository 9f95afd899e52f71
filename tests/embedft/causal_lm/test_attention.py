"""Our attention against transformers' own: the same values, gradients at least as near to the exact ones, and only where it helps."""

from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from embedft.causal_lm import attention
from embedft.causal_lm.attention import SHORT, attend

Tensors = tuple[torch.Tensor, ...]


class Module:
    num_key_value_groups, is_causal = 2, True


def mask_of(kind: str, length: int) -> torch.Tensor | None:
    """Of two rows: none; the second padded on the left; or two examples in each."""
    seen = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    if kind == "padded":
        seen[1, :, :, :3] = False  # the first three see nothing at all
    elif kind == "packed":
        seen[:, :, length // 2 :, : length // 2] = False
    return None if kind == "causal" else seen


def run(attend: Any, mask: torch.Tensor | None, dtype: torch.dtype, length: int) -> tuple[torch.Tensor, Tensors]:
    torch.manual_seed(0)
    made = [torch.randn(2, heads, length, 16).bfloat16().to(dtype).requires_grad_() for heads in (4, 2, 2)]
    out = attend(Module(), *made, mask, scaling=0.25)[0]
    upstream = torch.randn(out.shape)
    if mask is not None:
        upstream[1, :3] = 0  # nobody learns from padding
    return out, torch.autograd.grad(out, made, upstream.to(dtype))


@pytest.mark.parametrize("kind", ["causal", "padded", "packed"])
def test_values_are_torchs_and_gradients_no_further_from_the_exact_ones(kind: str) -> None:
    mask = mask_of(kind, 24)
    (ours, mine), (stock, theirs) = (run(one, mask, torch.bfloat16, 24) for one in (attend, sdpa_attention_forward))
    _, exact = run(sdpa_attention_forward, mask, torch.float32, 24)
    assert torch.equal(ours, stock)
    for own, other, true in zip(mine, theirs, exact, strict=True):
        assert own.dtype == torch.bfloat16
        assert torch.linalg.norm(own.float() - true) <= 1.05 * torch.linalg.norm(other.float() - true)
        assert torch.linalg.norm(own.float() - true) < 0.01 * torch.linalg.norm(true)


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 24), (torch.bfloat16, SHORT)])
def test_what_it_does_not_help_is_left_to_transformers(dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention._Attention, "apply", None)
    assert run(attend, None, dtype, length)[0].dtype == dtype
    with torch.no_grad():
        attend(Module(), *(torch.randn(1, heads, 8, 16).bfloat16() for heads in (4, 2, 2)), None)
