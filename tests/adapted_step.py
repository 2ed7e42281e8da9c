"""One step with an adapter that is not the identity: what its losses and gradients are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorasure import lora
from lorasure.init.apply import INITS, Evidence, Request, initialise
from lorasure.layers import checkpointed
from lorasure.objective import ForgetObjective, Unit
from lorasure.sites import Site


def terms_and_gradients(
    model: Any, sites: Sequence[Site], objective: ForgetObjective, step: Sequence[Unit], checkpointing: bool
) -> dict[str, Tensor]:
    """Loss terms and gradients by name. The objective has observed the original; the model keeps the adapter."""
    start, _ = initialise(model, sites, INITS["lora"], lambda _: Evidence(), Request(2, 2.0), None)
    wrapped = lora.attach(model, start, 2, 4.0, compensate=False)
    generator = torch.Generator().manual_seed(0)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    with checkpointed(model, checkpointing):
        sums = objective(wrapped, step)
        torch.stack(list(sums.values())).sum().backward()
    terms = {name: value.detach() for name, value in sums.items()}
    return terms | {name: p.grad for name, p in trained.items() if p.grad is not None}
