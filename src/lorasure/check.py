"""Is what was exported what was trained? By what models compute on a few rows, one gone before the next is there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .data.examples import Example, collate
from .errors import NumericError
from .forward import answer_logits
from .losses.tokens import ROWS, Answers

# That the trained layers' product may differ by, as it sums in another order than peft's. Measured on 24 layers: 10 in
# float32, 3 in bfloat16; more where experts are chosen, as rounding may choose others.
ROUNDINGS = {torch.float32: 256, torch.bfloat16: 8, torch.float16: 8}


@torch.no_grad()
def answers_of(model: Any, examples: Iterable[Example]) -> Iterator[Answers]:
    """What predicts the answer of each example, in a pass of its own, which takes less memory than training did."""
    for example in examples:
        yield answer_logits(model, collate([example]).to(model.device))[0]


def states_of(model: Any, examples: Iterable[Example]) -> list[Tensor]:
    """The states (answer tokens, d) in `answers_of`, on the CPU: for `check_export`."""
    return [answers.states.cpu() for answers in answers_of(model, examples)]


def trained_and_original(wrapped: Any, examples: Sequence[Example]) -> tuple[list[Tensor], list[Tensor]]:
    """The `states_of` a model with its adapter, and without it."""
    trained = states_of(wrapped, examples)
    with wrapped.disable_adapter():
        return trained, states_of(wrapped, examples)


def check_handed_over(
    handed: Sequence[Tensor], trained: Sequence[Tensor], original: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Raise a NumericError unless an adapter in the form that is handed over computes what the trained one did.

    Each: the `states_of` a model on the same rows. It must be at least four times as near to the trained
    model as the original is, or as near as rounding allows.
    """
    off, moved, size = _norm(handed, trained), _norm(trained, original), _norm(trained)
    if not off <= max(moved / 4, ROUNDINGS[dtype] * torch.finfo(dtype).eps * size):
        raise NumericError(
            f"export: the adapter to hand over differs from the trained one by {off:.2e} in the states that predict "
            f"answers, of size {size:.2e}; training has moved them by {moved:.2e}."
        )


def _norm(states: Sequence[Tensor], without: Sequence[Tensor] | None = None) -> float:
    """Of all states of all rows together, or of their differences."""
    rows = states if without is None else (a.float() - b.float() for a, b in zip(states, without, strict=True))
    return math.hypot(*(float(torch.linalg.vector_norm(row, dtype=torch.float32)) for row in rows))


@torch.no_grad()
def check_export(expected: Iterable[Tensor], found: Iterable[Answers], dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of two models' logits, and its bound: 1e-4 in float32, else 8 roundings of the largest.

    `expected`: the `states_of` one model, `found`: the `answers_of` the other; both have the same projection. Raises
    NumericError above the bound.
    """
    largest, differences = [], []
    for states, answers in zip(expected, found, strict=True):
        for one, other in zip(states.split(ROWS), answers.states.split(ROWS), strict=True):
            logits = answers.logits_of(one.to(other.device))
            largest.append(logits.abs().max().cpu())
            differences.append((logits - answers.logits_of(other)).abs().max().cpu())
    bound = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps * float(torch.stack(largest).max())
    difference = float(torch.stack(differences).max())
    if not difference <= bound < math.inf:
        raise NumericError(
            f"export: the adapter on the freshly loaded base differs from the trained model by {difference:.2e} in its "
            f"logits (at most {bound:.1e} allowed)."
        )
    return {"max_logit_difference": difference, "bound": bound}
