"""Products of bfloat16 numbers on the matrix units of a GPU, without a copy in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def operand(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x as a factor of our own products: bfloat16 on a GPU as it is, all else in `dtype`.

    A product of two bfloat16 numbers is exact in float32, in which the matrix units sum. An adapter's or a probe's
    factors are rounded to bfloat16 beside such an x, and that shows in a layer's output less than its own rounding
    does. Not float16: its range is too small for a product that is read again, nor on a CPU, where bfloat16 is slow.
    """
    return x if x.is_cuda and x.dtype == torch.bfloat16 else x.to(dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of two operands, matrices or batches of them; never rounded to bfloat16."""
    if left.dtype != torch.bfloat16:
        return left @ right
    return (torch.mm if left.ndim == 2 else torch.bmm)(left, right, out_dtype=torch.float32)
