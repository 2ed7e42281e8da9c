"""Losses that keep what a model should not forget: pure functions of answers, one value per example."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .forget import LossFunction
from .tokens import Answers


def nll(answers: Answers) -> torch.Tensor:
    """NLL per token of the retain answers, (count,) in nats."""
    return answers.nll_mean


def kl(answers: Answers, original_logits: torch.Tensor) -> torch.Tensor:
    """KL(p_original || p) in nats, averaged over each example's answer tokens, (count,).

    `original_logits` (tokens, vocab) are the original model's at the same tokens, in the same order: constants.
    """
    if original_logits.shape != answers.logits.shape:
        expected, got = tuple(answers.logits.shape), tuple(original_logits.shape)
        raise ValueError(f"expected original_logits (tokens, vocab) = {expected}, got {got}")
    log_q = torch.log_softmax(original_logits.detach().to(answers.logits.dtype), dim=-1)
    log_p = answers.logits - answers.log_normaliser[:, None]
    q = log_q.exp()
    # A token ruled out by the original (q = 0) adds 0, the limit of q log q, where 0 * -inf would give NaN.
    terms = torch.where(q > 0, q * (log_q - log_p), 0)
    return answers.mean(terms.sum(-1))


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
