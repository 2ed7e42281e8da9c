"""Losses that make a model forget: pure functions of answers, one value per example.

A function's positional parameters say what it needs, by these names, and its keyword-only parameters are its settings:

- `answers`: Answers of the model on the text to forget;
- `refusals`: Answers of the model on an "I don't know" answer to the same prompts, in the same order;
- `reference`: summed NLL (nats) of the original model on the text to forget, (count,), a constant;
- `refusal_reference`: the same on the refusals;
- `bigrams`: Bigrams of the answers to keep, a constant.

So the trainer computes what `needs(function)` names and calls every loss, the user's own as well, with
`bind(name, function, settings)(**{input: value for each need})`. Lower values mean more is forgotten.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import logsigmoid

from ..errors import UsageError
from .bigrams import Bigrams
from .tokens import Answers, log_prob

LossFunction = Callable[..., torch.Tensor]

INPUTS = ("answers", "refusals", "reference", "refusal_reference", "bigrams")


def ga(answers: Answers) -> torch.Tensor:
    """Gradient ascent: minus the NLL per token, (count,) in nats. No lower bound, so it needs a stopping rule."""
    return -answers.nll_mean


def npo(answers: Answers, reference: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """Negative preference optimisation, (count,): -(2/beta) log sigmoid(beta (NLL - reference)), NLL summed.

    Bounded below by 0; tends to gradient ascent on the summed NLL as beta goes to 0.
    """
    return _preference(answers.nll_sum - reference, beta)


def simnpo(answers: Answers, *, beta: float = 4.5, delta: float = 0.0) -> torch.Tensor:
    """NPO without a reference, (count,): -(2/beta) log sigmoid(beta (NLL per token - delta)).

    `delta` is the margin in nats per token; the paper writes it as gamma / beta.
    """
    return _preference(answers.nll_mean - delta, beta)


def ihl(answers: Answers) -> torch.Tensor:
    """Inverted hinge loss, (count,): mean over tokens of 1 + p(target) - max of p over the other tokens, in [0, 2]."""
    return answers.mean(answers.per_token(_hinge))


def _hinge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # Two entries of log p are all that has a slope: no one-hot, no second softmax.
    log_p = logits.log_softmax(-1)
    rivals = log_p.detach().scatter(-1, targets[:, None], -math.inf).argmax(-1)
    own, rival = log_p.gather(-1, torch.stack([targets, rivals], dim=-1)).exp().unbind(-1)
    return 1 + own - rival


def bga(answers: Answers, *, beta: float = 0.1, delta: float = 0.0) -> torch.Tensor:
    """Bounded gradient ascent, (count,): mean over tokens of p + beta max(0, log p + ln(vocabulary) + delta).

    The bound is ours. p alone has no slope once it is near 0, as in ihl, and leaves a true answer in other words
    likelier than a wrong one; log p alone has no bottom, as in ga. So a token counts fully while it is likely, and by
    beta until it is no likelier than one drawn from the vocabulary, or `delta` nats less. Never below 0.
    """

    def token(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        own = log_prob(logits, targets)
        return own.exp() + beta * (own + math.log(logits.shape[-1]) + delta).relu()

    return answers.mean(answers.per_token(token))


def bigram(answers: Answers, bigrams: Bigrams, *, beta: float = 0.1, delta: float = 2.0) -> torch.Tensor:
    """Bigram distillation, (count,): mean over tokens of p + beta (KL(q || p) + max(0, log p - log q + delta)).

    q is what a bigram model of the retain answers gives after the token before. The loss is ours: a model that never
    saw the text knows how such answers are written and nothing that they say, and so does q, where bga has a model say
    anything else. KL alone has hardly a slope for a token that is left at a few per cent. `delta` (nats): the same
    answer in other words, which is not trained on, ends above the one that is. Bounded below.
    """

    def token(logits: torch.Tensor, targets: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        log_q, log_p = bigrams.log_probs(previous), logits.log_softmax(-1)
        own, own_q = (t.gather(-1, targets[:, None])[:, 0] for t in (log_p, log_q))
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
        return own.exp() + beta * (divergence + (own - own_q + delta).relu())

    assert answers.previous is not None, "answers of a batch know the token before each"
    return answers.mean(answers.per_token(token, answers.previous))


def dpo(
    answers: Answers,
    refusals: Answers,
    reference: torch.Tensor,
    refusal_reference: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    """Direct preference optimisation of the refusal over the answer, (count,); NLL summed over tokens.

    -log sigmoid(beta ((NLL - reference) - (refusal NLL - refusal reference))), without npo's factor 2/beta.
    """
    margin = (answers.nll_sum - reference) - (refusals.nll_sum - refusal_reference)
    return -logsigmoid(beta * margin)


def idk(refusals: Answers) -> torch.Tensor:
    """NLL per token of the refusal, (count,) in nats: the model learns to say that it does not know."""
    return refusals.nll_mean


def catnip(answers: Answers, *, beta: float = 1.0) -> torch.Tensor:
    """Calibrated negative preference, (count,): mean over tokens of -(2/beta) log sigmoid(-beta log(p / q)).

    q = 1 - p with its gradient stopped, so d loss / d log p = 2 p^beta / (p^beta + (1 - p)^beta) for each token: tokens
    that the model is sure of are pushed hardest, and neither retain data nor a reference model is needed.
    """
    log_p = answers.log_probs
    # 1 - exp(x) loses every digit near x = 0, -expm1(x) none. Where p rounds to 1 the formula is log 0; log p is known
    # to no better than the dtype's eps, so eps is the smallest 1 - p that means anything.
    complement = (-torch.expm1(log_p.detach())).clamp_min(torch.finfo(log_p.dtype).eps)
    return answers.mean(_preference(complement.log() - log_p, beta))


def _preference(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """-(2/beta) log sigmoid(beta margin), finite for every finite margin."""
    return -2 / beta * logsigmoid(beta * margin)


@dataclass(frozen=True)
class ForgetLoss:
    """A row of FORGET_LOSSES. `retain` is the retain term it goes with unless the user names another."""

    title: str
    paper: str
    function: LossFunction
    retain: str = "nll"


FORGET_LOSSES: dict[str, ForgetLoss] = {
    "ga": ForgetLoss("Gradient ascent", "https://arxiv.org/abs/2401.06121", ga, retain="none"),
    "gd": ForgetLoss("Gradient difference", "https://arxiv.org/abs/2401.06121", ga),
    "kl": ForgetLoss("Gradient ascent with KL on retain", "https://arxiv.org/abs/2401.06121", ga, retain="kl"),
    "npo": ForgetLoss("Negative preference optimisation", "https://arxiv.org/abs/2404.05868", npo),
    "simnpo": ForgetLoss("Simple negative preference optimisation", "https://arxiv.org/abs/2410.07163", simnpo),
    "ihl": ForgetLoss("Inverted hinge loss", "https://arxiv.org/abs/2408.06621", ihl),
    "bga": ForgetLoss("Bounded gradient ascent", "https://arxiv.org/abs/2401.06121", bga),
    "bigram": ForgetLoss("Bigram distillation", "https://arxiv.org/abs/1503.02531", bigram),
    "dpo": ForgetLoss("Direct preference optimisation", "https://arxiv.org/abs/2305.18290", dpo),
    "idk": ForgetLoss("I don't know", "https://arxiv.org/abs/2401.06121", idk),
    "catnip": ForgetLoss("CATNIP", "https://arxiv.org/abs/2602.02824", catnip, retain="none"),
}


def needs(function: LossFunction) -> tuple[str, ...]:
    """The inputs a loss must be given: its parameters without a default, in order."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.default is p.empty)


def hyperparameters(function: LossFunction) -> dict[str, float]:
    """The settings of a loss with their defaults, which live in its signature and nowhere else."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def bind(name: str, function: LossFunction, settings: Mapping[str, float | None]) -> LossFunction:
    """Fix the settings that the user gave (None: not given); what is left takes the inputs, by keyword.

    `name` is the loss as the user knows it, for messages. Raises UsageError for a setting that this loss does not have.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    defaults = hyperparameters(function)
    for key, value in given.items():
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise UsageError(f"--{key} is not a setting of '{name}'; its settings: {known}.")
        # Every beta divides and multiplies, so that 0 gives 0/0 and a negative one turns the loss around.
        if not math.isfinite(value) or (key == "beta" and value <= 0):
            raise UsageError(f"--{key} must be {'above 0' if key == 'beta' else 'finite'}, got {value}")
    return partial(function, **given)
