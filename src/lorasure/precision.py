"""Float32 products of numbers that come in half precision, on the matrix units of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def matrix_units(source: Tensor) -> Iterator[None]:
    """Within the context float32 products on a GPU may round their factors to TF32, if `source` is in half precision.

    What was computed from bfloat16 numbers (8 binary digits) loses nothing by TF32's 11; sums stay float32. Only around
    our own products: a model's position embeddings would not stand it.
    """
    if not source.is_cuda or source.element_size() != 2:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
