"""The stack of decoder layers, and modules that compute something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import UsageError

Function = Callable[..., Any]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model's only stack of them, in order; empty where it has none, or several."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    stacks = [found for found in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in found)]
    return stacks[0] if len(stacks) == 1 else []


@contextmanager
def computing(modules: Iterable[Any], instead: Callable[[Function], Function]) -> Iterator[None]:
    """Within the context each module's forward is `instead` of its own; hooks on the module stay in force."""
    before = [(module, vars(module).get("forward")) for module in modules]  # peft and checkpointing put one there
    for module, _ in before:
        module.forward = instead(module.forward)
    try:
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def checkpointed(model: nn.Module) -> AbstractContextManager[None]:
    """Within the context, the backward pass recomputes each layer's activations.

    transformers' own switch works in training mode only, where the base's dropout would be active.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(f"--gradient-checkpointing: {type(model).__name__} does not support it.")
    return computing(layers, lambda forward: partial(checkpoint, forward, use_reentrant=False))
