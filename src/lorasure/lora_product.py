"""An adapted linear layer as one step of autograd; `lora.py` makes layers of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .precision import operand, product

ADAPTER_NAME = "default"


class LoraProduct(torch.autograd.Function):
    """y + s (B A - B0 A0) x for x (..., in), factors A (r, in), B (out, r) and frozen tails A0, -B0 or None.

    y (..., out) is the frozen layer's output of x; None where `weight` (out, in) and `bias` are given: it is then made
    here, and it and its gradient are added to in place. Both halves go through one pair of products, as
    (B - B0) A + B0 (A - A0), so that what training has changed is not the small difference of two large numbers; in the
    dtype that `operand` says, whatever that of x and y. Kept for the backward pass are x, which the layers that read it
    share, and numbers of the size of a factor or (tokens, 2 r); gradients are formed for A, B, x and y alone. Factors
    may have further axes of length 1; their gradients are of the same shape.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        a0: Tensor | None,
        b0: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """The adapted layer's output (..., out), in the base's dtype."""
        ctx.shapes, ctx.scaling, ctx.rank = (a.shape, b.shape), scaling, a.numel() // x.shape[-1]
        a, b = a.view(ctx.rank, -1), b.view(-1, ctx.rank)
        if a0 is not None and b0 is not None:
            a0, b0 = a0.view(a.shape), b0.view(b.shape)
            a, b = torch.cat([a, a - a0]), torch.cat([b + b0, -b0], dim=1)
        rows = operand(_rows(x), a.dtype)
        a, b = a.to(rows.dtype), b.to(rows.dtype)
        inner = rows @ a.T
        ctx.save_for_backward(x, inner, a, b, weight)
        if y is None:
            assert weight is not None
            return _add(linear(x, weight, bias), inner, b.T, scaling)
        return _add(y.clone(memory_format=torch.contiguous_format), inner, b.T, scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, y, A and B, from that of the output."""
        x, inner, a, b, weight = ctx.saved_tensors
        d = _rows(gradients[0]).to(b.dtype)
        to_x, to_y, _, _, to_a, to_b, *_ = ctx.needs_input_grad
        d_x = d_a = d_b = None
        back = (d @ b).mul_(ctx.scaling)
        if to_x:
            d_x = x.new_zeros(x.shape) if weight is None else gradients[0] @ weight
            d_x = _add(d_x, back, a, 1.0)
        if to_a:
            by_b = back.unflatten(1, (-1, ctx.rank)).sum(1)  # d (B - B0) + d B0
            d_a = product(by_b.T, _rows(x).to(a.dtype)).view(ctx.shapes[0])
        if to_b:  # few rows times many columns: several times as fast as many rows times few columns
            d_b = product(inner[:, : ctx.rank].T, d).mul_(ctx.scaling).T.reshape(ctx.shapes[1])
        return d_x, gradients[0] if to_y else None, None, None, d_a, d_b, None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """(tokens, features)"""
    return tensor.reshape(-1, tensor.shape[-1])


def _add(total: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """total + scaling x left @ right, in place, rounded once to the total's dtype."""
    rows = total.view(-1, total.shape[-1])  # never a copy, which would be added to in vain
    if total.dtype == left.dtype:
        rows.addmm_(left, right, alpha=scaling)
    else:
        rows.add_(left @ right, alpha=scaling)
    return total


@cache
def adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of peft's layers that computes the same in one step of autograd, without joining head and tail.

    A class, not a function in each layer, and its factors in a tuple, as torch gives every parametrized module a class
    of its own: so what torch.compile has made of one layer serves all.
    """

    class Adapted(kind):
        PEFTS = kind

        def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged or args or kwargs:
                return super().forward(x, *args, **kwargs)
            base = self.base_layer
            plain = type(base) is nn.Linear and not base.weight.requires_grad and "forward" not in vars(base)
            own = (None, base.weight, base.bias) if plain else (base(x), None, None)
            return LoraProduct.apply(x, *own, *self.factors, self.scaling[ADAPTER_NAME])

    Adapted.__name__ = kind.__name__  # in messages, and for who asks for a layer's kind by its name
    return Adapted
