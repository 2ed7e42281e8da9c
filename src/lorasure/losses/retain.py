"""Losses that keep what a model should not forget: pure functions of answers, one value per example."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .forget import LossFunction
from .tokens import Answers


def nll(answers: Answers) -> torch.Tensor:
    """NLL per token of the retain answers, (count,) in nats."""
    return answers.nll_mean


def kl(answers: Answers, original_states: torch.Tensor) -> torch.Tensor:
    """KL(p_original || p) in nats, averaged over each example's answer tokens, (count,).

    `original_states` (tokens, d) are the original model's at the same tokens, in the same order: constants, of which
    the answers' projection makes logits.
    """
    if original_states.shape != answers.states.shape:
        expected, got = tuple(answers.states.shape), tuple(original_states.shape)
        raise ValueError(f"expected original_states (tokens, d) = {expected}, got {got}")

    def divergence(logits: torch.Tensor, _: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        log_p = logits.log_softmax(-1)
        log_q = answers.logits_of(original.detach()).to(logits.dtype).log_softmax(-1)
        q = log_q.exp()
        # A token ruled out by the original (q = 0) adds 0, the limit of q log q, where 0 * -inf would give NaN.
        return torch.where(q > 0, q * (log_q - log_p), 0).sum(-1)

    return answers.mean(answers.per_token(divergence, original_states))


@dataclass(frozen=True)
class RetainLoss:
    """A row of RETAIN_LOSSES. A function of None means that retain rows are not run at all."""

    title: str
    paper: str
    function: LossFunction | None


RETAIN_LOSSES: dict[str, RetainLoss] = {
    "nll": RetainLoss("NLL of the retain answers", "https://arxiv.org/abs/2401.06121", nll),
    "kl": RetainLoss("KL to the original model", "https://arxiv.org/abs/2401.06121", kl),
    "none": RetainLoss("No retain term", "https://arxiv.org/abs/2401.06121", None),
}
