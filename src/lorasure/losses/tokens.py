"""From logits and labels to answer tokens: the one place where labels are shifted and masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..data.examples import IGNORED, Batch

TokenFunction = Callable[..., torch.Tensor]

ROWS = 256  # answer tokens at a time that have logits; fewer, and packing the projection's weight takes over


def shift(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where answer tokens are predicted, and which: `mask` (b, T) bool, `targets` (tokens,) int64 in row-major order.

    `labels` (b, T) hold the token at its own position; the logits at position t predict token t + 1, so `mask[:, t]`
    is true where `labels[:, t + 1]` is an answer token. The last position predicts nothing and is never marked.
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask, labels[:, 1:][mask[:, :-1]]


def _as_they_are(states: torch.Tensor) -> torch.Tensor:
    return states


@dataclass(frozen=True)
class Answers:
    """The answer tokens of `count` examples with what predicts them. Every loss takes this.

    `states` (tokens, d): what `project` turns into logits (n, vocab), n tokens at a time; the logits themselves unless
    it is given. It has no parameter that is trained. `targets` and `example` (tokens,) int64, the latter in [0, count).
    `previous` (tokens,) int64: the token before each target, of the prompt where it is the first.
    """

    states: torch.Tensor
    targets: torch.Tensor
    example: torch.Tensor
    count: int
    project: Callable[[torch.Tensor], torch.Tensor] = _as_they_are
    previous: torch.Tensor | None = None

    def __post_init__(self) -> None:
        tokens = tuple(self.states.shape[:1])
        if self.states.ndim != 2 or tuple(self.targets.shape) != tokens or tuple(self.example.shape) != tokens:
            raise ValueError(
                "expected logits (tokens, vocab), targets (tokens,) and example (tokens,), got "
                f"{tuple(self.states.shape)}, {tuple(self.targets.shape)} and {tuple(self.example.shape)}"
            )
        # A mean over no tokens is NaN and a sum is a silent zero: both would hide a broken row.
        empty = (self.lengths == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"example {empty[0]} of {self.count} has no answer token")

    @property
    def logits(self) -> torch.Tensor:
        """All logits at once, (tokens, vocab): for few tokens. Losses take theirs in `per_token`."""
        return self.logits_of(self.states)

    def logits_of(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocab) of some states (n, d), float32 (or float64)."""
        return _wide(self.project(states))

    def per_token(self, function: TokenFunction, *columns: torch.Tensor) -> torch.Tensor:
        """`function(logits, targets, *columns)` of all tokens, from ROWS of them at a time.

        It must give one value per token, (n,), from what that token has in logits (n, vocab), targets (n,) and columns
        (n, ...), which are constants. Without gradients it may give (n, ...).
        """
        return _PerToken.apply(self.states, self.logits_of, function, (self.targets, *columns))

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Answer tokens per example, (count,), in the dtype of the logits."""
        return self.total(torch.ones_like(self.example, dtype=_wide_dtype(self.states)))

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """Log-probability of each target in nats, (tokens,); never above 0."""
        return self.per_token(log_prob)

    @cached_property
    def nll_sum(self) -> torch.Tensor:
        """Negative log-likelihood of each answer in nats, summed over its tokens, (count,)."""
        return self.total(-self.log_probs)

    @cached_property
    def nll_mean(self) -> torch.Tensor:
        """Negative log-likelihood of each answer in nats per token, (count,)."""
        return self.nll_sum / self.lengths

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` (tokens,) over each example's tokens, (count,)."""
        return values.new_zeros(self.count).index_add(0, self.example, values)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average `values` (tokens,) over each example's tokens, (count,)."""
        return self.total(values) / self.lengths

    def split(self, sizes: Sequence[int]) -> list[Answers]:
        """Consecutive groups of examples, `sizes` of them each and together all, renumbered from 0. Views, no copies.

        A group of size 0 is an Answers of no examples. Examples must be in order, as `answers` makes them.
        """
        if sum(sizes) != self.count:
            raise ValueError(f"sizes must add up to {self.count} examples, got {list(sizes)}")
        bounds = [0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()]
        cuts = torch.searchsorted(self.example, torch.tensor(bounds, device=self.example.device)).tolist()
        parts = zip(cuts, cuts[1:], bounds, sizes, strict=False)
        return [
            replace(
                self,
                states=self.states[a:b],
                targets=self.targets[a:b],
                example=self.example[a:b] - first,
                count=size,
                previous=None if self.previous is None else self.previous[a:b],
            )
            for a, b, first, size in parts
        ]


def log_prob(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability (n,) in nats of `targets` (n,) under `logits` (n, vocab)."""
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


class _PerToken(torch.autograd.Function):
    """Values (tokens,) whose slopes with respect to the states are taken at once, while a chunk's logits are there.

    So no more than a chunk of (tokens, vocab) is ever held, in neither direction, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        logits_of: TokenFunction,
        function: TokenFunction,
        columns: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        values, slopes = [], []
        for part, *rest in zip(states.split(ROWS), *(column.split(ROWS) for column in columns), strict=True):
            if not ctx.needs_input_grad[0]:
                values.append(function(logits_of(part), *rest))
                continue
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                value = function(logits_of(leaf), *rest)
                slopes.append(torch.autograd.grad(value.sum(), leaf)[0])
            values.append(value.detach())
        ctx.save_for_backward(*slopes)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slopes = torch.cat(ctx.saved_tensors)
        return (gradients[0][:, None] * slopes).to(slopes.dtype), None, None, None


def _wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least: half-precision logits are raised here, once; every later sum is float32."""
    return tensor.to(_wide_dtype(tensor))


def answers(logits: torch.Tensor, labels: torch.Tensor) -> Answers:
    """Answers from a model's whole output: `logits` (b, T, vocab) and unshifted `labels` (b, T)."""
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"expected logits (b, T, vocab) and labels (b, T), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    mask, targets = shift(labels)
    return Answers(logits[mask], targets, mask.nonzero(as_tuple=True)[0], len(labels))


def batch_answers(
    states: torch.Tensor, batch: Batch, project: Callable[[torch.Tensor], torch.Tensor] = _as_they_are
) -> Answers:
    """Answers of a batch from `states` (tokens, d) taken at the positions that `shift(batch.labels)` marks."""
    mask, targets = shift(batch.labels)
    at = mask.nonzero(as_tuple=True)  # once: a device has to be waited for
    return Answers(states, targets, batch.example[at], batch.count, project, batch.input_ids[at])
