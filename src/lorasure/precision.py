"""Float32 products of numbers that come in half precision, on the matrix units of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def matrix_units(source: Tensor) -> Iterator[None]:
    """Within the context float32 products on a GPU may round their factors to TF32, if `source` is in half precision.

    TF32 has 11 binary digits, sums stay float32. Numbers that come in bfloat16 (8) are exact in it. Float32 factors of
    an adapter or a probe are rounded, and that shows in a layer's output less than its own rounding to bfloat16 does.
    Only around our own products: a model's position embeddings would not stand it. Where the caller has chosen by
    PyTorch's newer settings (`torch.backends`), that stands.
    """
    if not source.is_cuda or source.element_size() != 2:
        yield
        return
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the two kinds of settings do not mix
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
