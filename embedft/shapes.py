"""Few shapes of batches. On a CPU oneDNN compiles a bf16 product for every shape that it meets, and keeps it: a run whose batches are all
of different lengths pays for that in its first steps, and holds more memory for products than for anything else."""

import torch


def rounded(length: int, dtype: torch.dtype, *, steps: int) -> int:
    """`length` and a little more, in bf16: of the lengths from one power of two to the next there are `steps`. Else `length`."""
    if dtype != torch.bfloat16 or length < 1:
        return length
    unit = max(1, (1 << length.bit_length() - 1) // steps)
    return -(-length // unit) * unit
