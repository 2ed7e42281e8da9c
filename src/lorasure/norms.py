"""Norms by the root mean square in one kernel or few, where a model's own code makes a dozen of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .tried import close, kept_if_same, tried


class Scaling(torch.autograd.Function):
    """x / sqrt(mean of x^2 + eps) times a frozen weight, in float32 and rounded to x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (..., n), weight (n,)."""
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        x, weight, scale = ctx.saved_tensors
        wide, back = x.float(), gradients[0].float() * weight
        along = torch.linalg.vecdot(back, wide)[..., None].mul_(scale**3).div_(-x.shape[-1])
        return back.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


class Norm(nn.RMSNorm):
    """PyTorch's norm; on a CPU, where it is no kernel of its own, seven operations there and back instead of 13."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.weight.requires_grad:
            return super().forward(x)
        return Scaling.apply(x, self.weight, self.eps)


def fuse_norms(model: PreTrainedModel) -> None:
    """Replace the norms that compute what torch.nn.RMSNorm does by Norm, weights and names as they are.

    By a try of each norm, then of the model: one that fails with them, or whose logits differ, keeps its own. On a GPU
    the activations kept are fewer too.
    """
    with torch.no_grad():
        chosen = list(_fusible(model))
    give = lambda which: [setattr(parent, name, norms[which]) for parent, name, *norms in chosen]  # noqa: E731
    if chosen:
        kept_if_same(model, partial(give, 1), partial(give, 0))


def _fusible(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, Norm]]:
    """(parent, its name there, the norm, what would replace it)."""
    for parent in model.modules():
        for name, norm in parent.named_children():
            weight: Any = getattr(norm, "weight", None)
            eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            plain = isinstance(weight, nn.Parameter) and weight.dim() == 1 and len(list(norm.parameters())) == 1
            if not (plain and isinstance(eps, float) and type(norm).__name__.endswith("RMSNorm")):
                continue
            fused = Norm(weight.shape, eps, device="meta").train(norm.training)
            fused.weight = weight
            if tried(partial(_same, fused, norm)):
                yield parent, name, norm, fused


def _same(fused: Norm, norm: nn.Module) -> bool:
    """On numbers of about the size of eps, which then takes part; weights may all be 1, or 0 where 1 is added."""
    weight, eps = fused.weight, fused.eps or 0.0
    x = torch.linspace(-2, 2, weight.numel(), device=weight.device, dtype=weight.dtype) * eps**0.5
    return bool(close(fused(x), norm(x), 0, 4, weight.dtype).all())
