"""Trials of a model: what its own code gives to something unusual, and whether that is what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .memory import is_out_of_memory

Result = TypeVar("Result")


def tried(attempt: Callable[[], Result]) -> Result | None:
    """What `attempt` gives, None where a model's code fails in whatever way; out of memory is raised."""
    try:
        return attempt()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None


def close(found: Tensor, expected: Tensor, share: float, roundings: int, dtype: torch.dtype) -> Tensor:
    """Which entries of `found` equal `expected`, to a share of its largest or some roundings of `dtype`, if more."""
    bound = max(share, roundings * torch.finfo(dtype).eps) * expected.abs().max()
    return (found - expected).abs() <= bound
