"""Products of bfloat16 numbers on a GPU: as they are, summed and given in float32; everything else as it always was."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorasure.precision import operand, product


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_cpu_operands_are_raised(dtype):
    assert operand(torch.ones(2, 2, dtype=dtype)).dtype == torch.float32
    assert operand(torch.ones(2, 2, dtype=dtype), torch.float64).dtype == torch.float64


def test_on_a_gpu_only_bfloat16_stays():
    def on_gpu(dtype) -> Any:
        return SimpleNamespace(is_cuda=True, dtype=dtype, to=lambda dtype: "raised")

    found = on_gpu(torch.bfloat16)
    assert operand(found) is found
    assert operand(on_gpu(torch.float16)) == operand(on_gpu(torch.float32)) == "raised"


@pytest.mark.parametrize("name", ["mm", "bmm"])
def test_a_product_of_bfloat16_is_asked_for_in_float32(name, monkeypatch):
    """By PyTorch's own call for it, which there is for GPUs only."""
    shape = {"mm": (3, 4), "bmm": (2, 3, 4)}[name]
    left, right = torch.randn(shape).bfloat16(), torch.randn(shape).mT.bfloat16()
    monkeypatch.setattr(torch, name, lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    found = product(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, left.float() @ right.float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", [(300, 7), (5, 37, 24)])
def test_on_a_gpu_sums_are_in_float32(shape):
    left, right = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    found, exact = product(left.mT, right), left.mT.double() @ right.double()
    assert float((found - exact).norm() / exact.norm()) < 1e-5
