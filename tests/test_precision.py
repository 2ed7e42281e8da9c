"""Rounded products are asked for where they lose nothing, and for no longer than that."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorasure.precision import matrix_units

ON_GPU: Any = {size: SimpleNamespace(is_cuda=True, element_size=lambda size=size: size) for size in (2, 4)}


@pytest.mark.parametrize("before", ["highest", "high"])
@pytest.mark.parametrize(
    ("source", "within"), [(ON_GPU[2], "high"), (ON_GPU[4], None), (torch.ones(1, dtype=torch.bfloat16), None)]
)
def test_only_for_half_precision_on_a_gpu(source, within, before):
    torch.set_float32_matmul_precision(before)
    try:
        with pytest.raises(KeyError), matrix_units(source):
            assert torch.get_float32_matmul_precision() == (within or before)
            raise KeyError
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="settings of torch 2.9")
def test_what_was_chosen_by_the_newer_settings_stands():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with matrix_units(ON_GPU[2]):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
