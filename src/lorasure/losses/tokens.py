"""From logits and labels to answer tokens: the one place where labels are shifted and masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..data.examples import IGNORED


def shift(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where answer tokens are predicted, and which: `mask` (b, T) bool, `targets` (tokens,) int64 in row-major order.

    `labels` (b, T) hold the token at its own position; the logits at position t predict token t + 1, so `mask[:, t]`
    is true where `labels[:, t + 1]` is an answer token. The last position predicts nothing and is never marked.
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask, labels[:, 1:][mask[:, :-1]]


@dataclass(frozen=True)
class Answers:
    """The answer tokens of `count` examples with the logits that predict them. Every loss takes this.

    `logits` (tokens, vocab) float32 (or float64), `targets` (tokens,) int64, `example` (tokens,) int64 in [0, count).
    """

    logits: torch.Tensor
    targets: torch.Tensor
    example: torch.Tensor
    count: int

    def __post_init__(self) -> None:
        tokens = tuple(self.logits.shape[:1])
        if self.logits.ndim != 2 or tuple(self.targets.shape) != tokens or tuple(self.example.shape) != tokens:
            raise ValueError(
                "expected logits (tokens, vocab), targets (tokens,) and example (tokens,), got "
                f"{tuple(self.logits.shape)}, {tuple(self.targets.shape)} and {tuple(self.example.shape)}"
            )
        # A mean over no tokens is NaN and a sum is a silent zero: both would hide a broken row.
        empty = (self.lengths == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"example {empty[0]} of {self.count} has no answer token")

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Answer tokens per example, (count,), in the dtype of the logits."""
        return self.total(torch.ones_like(self.example, dtype=self.logits.dtype))

    @cached_property
    def log_normaliser(self) -> torch.Tensor:
        """log sum exp of each token's logits, (tokens,)."""
        return torch.logsumexp(self.logits, dim=-1)

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """Log-probability of each target in nats, (tokens,); never above 0, and no second (tokens, vocab) is made."""
        return self.logits.gather(-1, self.targets[:, None]).squeeze(-1) - self.log_normaliser

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
            Answers(self.logits[a:b], self.targets[a:b], self.example[a:b] - first, size) for a, b, first, size in parts
        ]


def answers(logits: torch.Tensor, labels: torch.Tensor) -> Answers:
    """Answers from a model's whole output: `logits` (b, T, vocab) and unshifted `labels` (b, T)."""
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"expected logits (b, T, vocab) and labels (b, T), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    return selected_answers(logits[shift(labels)[0]], labels)


def selected_answers(logits: torch.Tensor, labels: torch.Tensor) -> Answers:
    """Answers from `logits` (tokens, vocab) already taken at the positions that `shift(labels)` marks, `labels` (b, T).

    Half-precision logits are raised to float32 here, once; every later sum is float32 (float64 logits stay float64).
    """
    mask, targets = shift(labels)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return Answers(wide, targets, mask.nonzero(as_tuple=True)[0], len(labels))
