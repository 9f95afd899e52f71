"""Batches of few shapes: how few, how much longer they are, and that what is added changes nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedft.shapes import rounded


@given(length=st.integers(1, 100_000), steps=st.sampled_from([4, 8, 32]))
def test_a_length_in_bf16_grows_by_less_than_a_step(length: int, steps: int) -> None:
    found = rounded(length, torch.bfloat16, steps=steps)
    assert length <= found <= length * (1 + 1 / steps)
    assert rounded(found, torch.bfloat16, steps=steps) == found


@pytest.mark.parametrize("steps", [4, 8, 32])
def test_between_two_powers_of_two_there_are_so_many_lengths(steps: int) -> None:
    assert len({rounded(length, torch.bfloat16, steps=steps) for length in range(1025, 2049)}) == steps


def test_other_dtypes_are_left_as_they_are() -> None:
    assert [rounded(length, torch.float32, steps=4) for length in (1, 77, 1001)] == [1, 77, 1001]
