"""A tap on sites: what flows through them, at every pass of the model, without a change of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .errors import UsageError
from .sites import Site

Forward = Callable[[Site, Tensor, Tensor], Tensor | None]
Backward = Callable[[Site, Tensor, Tensor], None]

TAPPED_EXPERTS = "lorasure_tapped"
_ROOT = torch.zeros((), requires_grad=True)  # without which autograd would save nothing


@contextmanager
def tap(
    model: PreTrainedModel, sites: Sequence[Site], *, forward: Forward | None = None, backward: Backward | None = None
) -> Iterator[None]:
    """Within the context, call back for every site at every pass of the model; the model itself is not changed.

    `forward(site, x, y)` sees inputs x (examples, tokens, in) and outputs y (examples, tokens, out) and may return what
    is to be added to y. `backward(site, x, d)` sees the inputs and the loss gradient d with respect to the outputs. For
    an expert, tokens that were routed elsewhere are zero in x, y and d. With `backward`, the graph starts at the lowest
    site: nothing below it is recorded, and no weight gets a gradient. Within the context the model is in evaluation
    mode and frozen.
    """
    chosen: dict[str, list[Site]] = {}
    for site in sites:
        chosen.setdefault(site.module, []).append(site)
    size = [0, 0]  # examples and (padded) tokens per example in the current forward pass
    with ExitStack() as stack:
        stack.enter_context(_at_rest(model))

        def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
            size[:] = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape

        stack.callback(model.register_forward_pre_hook(remember, with_kwargs=True).remove)
        experts = [name for name, group in chosen.items() if group[0].parameter is not None]
        if experts:
            stack.enter_context(_tapped_experts(model, {n: chosen[n] for n in experts}, size, forward, backward))
        for name, group in chosen.items():
            if name not in experts:
                hook = _linear_hook(group[0], size, forward, backward)
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


@contextmanager
def _at_rest(model: PreTrainedModel) -> Iterator[None]:
    """No dropout and no parameter gradients; each module's mode and each parameter's flag as before afterwards."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class _Layout:
    """How a site's own token layout becomes (examples, tokens, features), and back."""

    spread: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]


class _Kept(torch.autograd.Function):
    """Saves x as autograd saves what it needs, so that a checkpointed layer gives it up and computes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return root.new_empty(0)


def _listen(
    site: Site, x: Tensor, y: Tensor, layout: _Layout, forward: Forward | None, backward: Backward | None
) -> Tensor:
    """Call `forward` now, arrange for `backward` to be called with y's gradient, and return the outputs to use."""
    extra = forward(site, layout.spread(x), layout.spread(y)) if forward else None
    x = x.detach()  # for `backward` alone: what `forward` adds is part of the model, gradients flow through it to x
    if extra is not None:
        y = y + layout.gather(extra).to(y.dtype)
    if backward is not None:
        if not torch.is_grad_enabled():
            raise UsageError(
                f"Layer '{site.name}' is also run without gradients, so these cannot be measured; leave it out with "
                "--exclude, or take an --init that needs no importance."
            )
        # The lowest sites: the graph starts here; a sum, not a leaf, so that writing into it is legal. And views: where
        # a model writes into one, its gradient passes it by (Falcon adds its attention to the outputs of its MLP).
        if not y.requires_grad:
            y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
        elif y._is_view():
            y = y.clone()
        kept: Any = _Kept.apply(x, _ROOT)
        y.register_hook(lambda d: backward(site, layout.spread(kept.grad_fn.saved_tensors[0]), layout.spread(d)))
    return y


def _sees_whole_examples(shape: torch.Size, examples: int, tokens: int) -> bool:
    """Whether outputs are laid out example by example: (examples, ..., out) or all tokens in a row, (..., tokens, out).

    A count alone would not do: one that happens to divide by the number of examples would mix their gradients.
    """
    if len(shape) > 2 and shape[0] == examples:
        return True
    return set(shape[:-2]) <= {1} and len(shape) > 1 and shape[-2] == examples * tokens


def _linear_hook(site: Site, size: list[int], forward: Forward | None, backward: Backward | None) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        examples, tokens = size
        shape = output.shape  # not the tensor: a hook that holds its own output is a cycle that keeps the whole graph
        if not _sees_whole_examples(shape, examples, tokens):
            raise UsageError(
                f"Layer '{site.name}' does not see whole examples (outputs of shape {tuple(shape)} for {examples} "
                f"examples of {tokens} tokens), so it cannot be measured; leave it out with --exclude."
            )
        layout = _Layout(lambda t: t.reshape(examples, -1, t.shape[-1]), lambda t: t.reshape(shape))
        return _listen(site, args[0], output, layout, forward, backward)

    return hook


@contextmanager
def _tapped_experts(
    model: PreTrainedModel,
    chosen: dict[str, list[Site]],
    size: list[int],
    forward: Forward | None,
    backward: Backward | None,
) -> Iterator[None]:
    """Run the mixture layers through our own experts function, one matrix product per expert, with the tap between."""
    table = {id(model.get_submodule(n)): {(s.parameter, s.expert): s for s in group} for n, group in chosen.items()}

    def linear(module: Any, parameter: str, expert: int, x: Tensor, tokens: Tensor, total: int) -> Tensor:
        matrix = getattr(module, parameter)[expert]
        bias = getattr(module, f"{parameter}_bias")[expert] if module.has_bias else None
        y = nn.functional.linear(x, matrix.T if module.is_transposed else matrix, bias)
        site = table.get(id(module), {}).get((parameter, expert))
        if site is None:
            return y
        examples = size[0]
        layout = _Layout(
            lambda t: t.new_zeros(total, t.shape[-1]).index_copy(0, tokens, t).view(examples, -1, t.shape[-1]),
            lambda t: t.reshape(total, -1)[tokens],
        )
        return _listen(site, x, y, layout, forward, backward)

    def experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        first = "gate_up_proj" if module.has_gate else "up_proj"
        for expert in range(module.num_experts):
            tokens, slot = torch.where(top_k_index == expert)
            if len(tokens) == 0:
                continue
            inner = linear(module, first, expert, hidden[tokens], tokens, len(hidden))
            inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            outer = linear(module, "down_proj", expert, inner, tokens, len(hidden))
            if module.has_post_expert_norm:
                outer = module.post_expert_norm(outer)
            result = result.index_add(0, tokens, (outer * top_k_weights[tokens, slot, None]).to(result.dtype))
        return result

    before = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS[TAPPED_EXPERTS] = experts
    try:
        model.set_experts_implementation(TAPPED_EXPERTS)
        yield
    finally:
        model.set_experts_implementation(before)
        del ALL_EXPERTS_FUNCTIONS[TAPPED_EXPERTS]  # it holds the listeners, and they hold what they gathered
