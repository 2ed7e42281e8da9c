"""Norms by the root mean square in one kernel, where a model's own code makes a dozen of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .tried import close, tried

SAME = 1e-3  # of the largest logit, or 16 roundings: a norm of two roundings becomes one of one


@torch.no_grad()
def fuse_norms(model: PreTrainedModel) -> None:
    """Replace the norms that compute what torch.nn.RMSNorm does by it, weights and names as they are.

    By a try of each norm, then of the model: one that fails with them, or whose logits differ, keeps its own. For a
    GPU, where the activations kept are fewer too; on a CPU PyTorch has no such kernel.
    """
    ids = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    before, chosen = tried(lambda: model(input_ids=ids, use_cache=False).logits.float()), list(_fusible(model))
    if before is None:
        return
    for parent, name, _, fused in chosen:
        setattr(parent, name, fused)
    after = tried(lambda: model(input_ids=ids, use_cache=False).logits.float())
    if after is None or not close(after, before, SAME, 16, model.dtype).all():
        for parent, name, own, _ in chosen:
            setattr(parent, name, own)


def _fusible(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, nn.RMSNorm]]:
    """(parent, its name there, the norm, what would replace it)."""
    for parent in model.modules():
        for name, norm in parent.named_children():
            weight: Any = getattr(norm, "weight", None)
            eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            plain = isinstance(weight, nn.Parameter) and weight.dim() == 1 and len(list(norm.parameters())) == 1
            if not (plain and isinstance(eps, float) and type(norm).__name__.endswith("RMSNorm")):
                continue
            fused = nn.RMSNorm(weight.shape, eps, device="meta").train(norm.training)
            fused.weight = weight
            if tried(partial(_same, fused, norm)):
                yield parent, name, norm, fused


def _same(fused: nn.RMSNorm, norm: nn.Module) -> bool:
    """On numbers of about the size of eps, which then takes part; weights may all be 1, or 0 where 1 is added."""
    weight, eps = fused.weight, fused.eps or 0.0
    x = torch.linspace(-2, 2, weight.numel(), device=weight.device, dtype=weight.dtype) * eps**0.5
    return bool(close(fused(x), norm(x), 0, 4, weight.dtype).all())
