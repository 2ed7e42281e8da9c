"""Model -> what shows inside it on given examples: hidden states per layer, and how hard they pull on the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ..data.examples import Example, collate, micro_batches
from ..forward import Progress, answer_logits, base_of
from ..losses.tokens import shift


@torch.no_grad()
def layer_means(
    model: Any, examples: Sequence[Example], token_budget: int, progress: Progress | None = None
) -> list[np.ndarray]:
    """Per layer (n, hidden) float32: the mean of the hidden states that predict an example's answer tokens.

    The embeddings come first, then each layer's output, the last after the final norm. The result does not depend on
    `token_budget` (padded tokens per pass).
    """
    base = base_of(model)
    found: list[list[Tensor]] = [[] for _ in examples]
    for group in micro_batches([len(e) for e in examples], token_budget):
        batch = collate([examples[i] for i in group]).to(base.device)
        mask, _ = shift(batch.labels)
        states = base.base_model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
        for i, own, row in zip(group, mask, range(len(group)), strict=True):
            found[i] = [layer[row, own].float().mean(dim=0).cpu() for layer in states]
        if progress:
            progress(len(group))
    return [torch.stack(layer).numpy() for layer in zip(*found, strict=True)]


def gradient_norms(
    model: Any,
    examples: Sequence[Example],
    weights: Sequence[Parameter] | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Euclidean norm of the gradient of each example's L (mean NLL, nats per answer token) with respect to `weights`.

    `weights`: all of the model's floating-point parameters unless chosen, whether they are trainable or not. Dropout is
    off. One example at a time, and memory for one gradient of every weight.
    """
    chosen = [p for p in model.parameters() if p.is_floating_point()] if weights is None else list(weights)
    norms = []
    with _differentiable(model, chosen):
        for example in examples:
            answers, _ = answer_logits(model, collate([example]).to(base_of(model).device))
            gradients = torch.autograd.grad(answers.nll_mean.sum(), chosen, materialize_grads=True)
            parts = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
            norms.append(float(torch.linalg.vector_norm(torch.stack(parts))))
            if progress:
                progress(1)
    return norms


@contextmanager
def _differentiable(model: Any, weights: Sequence[Parameter]) -> Iterator[None]:
    """Within the block the model is in evaluation mode and exactly `weights` are trainable; then all is as it was."""
    training, before = model.training, [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        model.train(training)
        for parameter, flag in before:
            parameter.requires_grad_(flag)
