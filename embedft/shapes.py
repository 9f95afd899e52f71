"""Few shapes of batches. On a CPU oneDNN compiles a product for every shape that it meets, and keeps it: a run whose batches are all
of different lengths pays for that in its first steps, and holds more memory for products than for anything else."""

import torch


def few(length: int, *, steps: int) -> int:
    """`length` and a little more: of the lengths from one power of two to the next there are `steps`."""
    unit = max(1, (1 << max(length, 1).bit_length() - 1) // steps)
    return -(-length // unit) * unit


def rounded(length: int, dtype: torch.dtype, *, steps: int) -> int:
    """The same where torch itself asks oneDNN, in bf16; else `length`."""
    return few(length, steps=steps) if dtype == torch.bfloat16 else length
