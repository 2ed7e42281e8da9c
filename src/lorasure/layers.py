"""The stack of decoder layers, and modules that compute something else, or otherwise, for a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from . import processes
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


def checkpointed(model: nn.Module, wanted: bool | None) -> AbstractContextManager[None]:
    """Within the context, if wanted, the backward pass recomputes the activations of each layer but the last.

    Those of the last would be computed again at once, when no other layer's are there yet. transformers' own switch
    works in training mode only, where the base's dropout would be active.
    """
    if not wanted:
        return nullcontext()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(f"--gradient-checkpointing: {type(model).__name__} does not support it.")
    return computing(layers[:-1], lambda forward: partial(checkpoint, forward, use_reentrant=False))


# Of what a compiled layer keeps for its way back without it: below, all but products is computed again there.
KEPT_SHARE = 0.25


def inner_layers(model: nn.Module) -> list[nn.Module]:
    """Those that `compiled` is for: above the lowest that is trained (its input has no gradient), without the last."""
    layers = decoder_layers(model)
    trained = [i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
    return layers[trained[0] + 1 : -1] if trained else []


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Within the context torch.compile runs the inner decoder layers, if there are any, as one program for all of them.

    So only layers of the most common make are. Of others, and of the lowest and the last (see `at_answers`), each would
    be a program of its own, and one takes as long as a short run.
    """
    if processes.sharded():
        raise UsageError("--compile: not where the base's weights are shared out; leave out one or the other.")
    inner = inner_layers(model)
    if not inner:
        yield
        return
    makes = [(type(layer), *(type(module).__name__ for module in layer.modules())) for layer in inner]
    (common, _), *_ = Counter(makes).most_common()
    program = torch.compile(common[0].forward, dynamic=True)
    chosen = [layer for layer, make in zip(inner, makes, strict=True) if make == common]
    with (
        catch_warnings(),
        torch._functorch.config.patch(activation_memory_budget=KEPT_SHARE),
        computing(chosen, lambda forward: partial(program, forward.__self__)),
    ):
        filterwarnings("ignore", module=r"torch\.")  # of what torch.compile itself does
        try:
            yield
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            text = f"--compile: torch.compile fails on this model or machine ({type(error).__name__})."
            raise UsageError(text) from error
