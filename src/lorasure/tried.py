"""Trials of a model: what its own code gives to something unusual, and whether that is what was expected."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import is_out_of_memory

Result = TypeVar("Result")
SAME = 1e-3  # of the largest logit, or 16 roundings: what was several roundings becomes one


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


@torch.no_grad()
def kept_if_same(model: PreTrainedModel, replace: Callable[[], object], restore: Callable[[], object]) -> None:
    """Change a model by `replace`, and back by `restore` if it fails with that or gives other logits."""
    ids = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    logits = partial(tried, lambda: model(input_ids=ids, use_cache=False).logits.float())
    before = logits()
    if before is None:
        return
    replace()
    after = logits()
    if after is None or not close(after, before, SAME, 16, model.dtype).all():
        restore()
