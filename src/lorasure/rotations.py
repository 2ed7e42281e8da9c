"""Rotary position embeddings in three operations on a tensor, where a model's own code makes a dozen of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .tried import close, kept_if_same, tried

NAME, ARGUMENTS = "apply_rotary_pos_emb", ["q", "k", "cos", "sin", "unsqueeze_dim"]  # of transformers' function


class Rotation(torch.autograd.Function):
    """x cos + (-x2, x1) sin, of the halves x1 and x2 of the last axis; nothing of x is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (..., head), cos and sin to be broadcast over it."""
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return _turned(x, cos, first, second, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _turned(gradients[0], cos, second, first, 1), None, None


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    """x cos + sign (x2 first, -x1 second)"""
    total, (x1, x2) = x * cos, x.chunk(2, -1)
    half = x1.shape[-1]
    total[..., :half].addcmul_(x2, first, value=sign)
    total[..., half:].addcmul_(x1, second, value=-sign)
    return total


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """What transformers' function of ARGUMENTS computes in Llama and in models that took it from there."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)


def fuse_rotations(model: PreTrainedModel) -> None:
    """Let the attention layers whose function of NAME computes what `rotate` does call that instead.

    By a try of the function, then of the model: one whose logits differ keeps its own. As norms (`fuse_norms`), these
    are what is left to save where products are fast.
    """
    kinds = {kind for kind in set(map(type, model.modules())) if _fits(kind, model.dtype, model.device)}
    chosen = [(module, type(module)) for module in model.modules() if type(module) in kinds]

    def give(kind_of: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
        for module, own in chosen:
            module.__class__ = kind_of(own)

    if chosen:
        kept_if_same(model, partial(give, _rotating), partial(give, lambda own: own))


def _fits(kind: type[nn.Module], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the code of a kind of layers calls a function that computes what `rotate` does."""
    code = _code(kind)
    own = getattr(code, "__globals__", {}).get(NAME)
    return bool(own and NAME in code.__code__.co_names and tried(partial(_same, own, dtype, device)))


def _code(kind: type[nn.Module]) -> Any:
    """The function of a kind's forward, behind what warns of old names of arguments."""
    return inspect.unwrap(kind.forward)


def _same(own: Any, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in [(2, 3, 3, 8)] * 2 + [(2, 3, 8)] * 2
    )
    return list(inspect.signature(own).parameters) == ARGUMENTS and all(
        bool(close(found, expected, 0, 4, dtype).all()) and found.dtype == expected.dtype
        for dim in (1, 2)
        for found, expected in zip(rotate(q, k, cos, sin, dim), own(q, k, cos, sin, dim), strict=True)
    )


@cache
def _rotating(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of attention layers whose forward is the same code, with `rotate` under NAME.

    A class, not a function in each layer: what torch.compile has made of one layer serves all. The module that the
    code is from stays as it is, for other models of this process.
    """
    own = _code(kind)
    names = own.__globals__ | {NAME: rotate}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
