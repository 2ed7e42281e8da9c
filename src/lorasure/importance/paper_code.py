"""`--compat paper-code`: the arithmetic of the public FILA and VILA scripts, so that their numbers can be checked.

What differs from ours, all kept here on purpose: the gradient is that of a *batch's* mean loss and its moments are
weighted by the batch's token count, so they change with the batch size; the random probe is added to the model and not
compensated, so another model is measured; ten passes over the data; retain rows drawn uniformly with replacement;
VILA's variances are divided by the token count a second time; an absolute epsilon of 1e-5 in the ratio. Our only
departure: sums are kept in float32, where the scripts sum in the model's dtype.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.examples import Example, collate
from ..errors import UsageError
from ..forward import Progress, answer_logits
from ..sites import Site
from ..tap import tap
from .collect import Probe, SetMoments, per_example
from .moments import Moments

EPSILON = 1e-5
PASSES = 10
BATCH_SIZE = 4
PUBLISHED = (("fisher", "full"), ("variance", "lora"))


def paper_moments(
    model: PreTrainedModel,
    sites: Sequence[Site],
    forget: Sequence[Example],
    retain: Sequence[Example],
    probe: Probe,
    *,
    score: str,
    progress: Progress | None = None,
) -> tuple[SetMoments, SetMoments]:
    """The two sets' published scores, as Moments whose `second` and `variance` are that score; the floor is EPSILON."""
    check_published(score, probe.space)
    generator = random.Random(probe.seed)
    sums: dict[str, _Sums] = {name: _Sums(model, sites, probe) for name in ("forget", "retain")}
    for _ in range(PASSES):
        order = generator.sample(range(len(forget)), len(forget))
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            sums["forget"].add([forget[i] for i in chosen])
            sums["retain"].add(generator.choices(retain, k=len(chosen)))
            if progress:
                progress(2 * len(chosen))
    forget_scores, retain_scores = (sums[name].scores(score) for name in sums)
    return forget_scores, retain_scores


def check_published(score: str, space: str) -> None:
    """Only what the scripts do has an arithmetic to reproduce. Raises UsageError for anything else."""
    if (score, space) not in PUBLISHED:
        choices = " or ".join(f"--score {s} --space {p}" for s, p in PUBLISHED)
        raise UsageError(f"--compat paper-code covers {choices}, got --score {score} --space {space}.")


class _Sums:
    """Token-weighted sums of the batch gradient and of its square, per site and factor."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], probe: Probe) -> None:
        self.model, self.sites, self.probe = model, sites, probe
        self.factors = {site.name: probe.factors(site, model.device) for site in sites}
        self.operands = {site.name: probe.operands(site, model) for site in sites}
        self.tokens = 0
        self.first: dict[tuple[str, str], Tensor] = {}
        self.second: dict[tuple[str, str], Tensor] = {}

    def add(self, batch: Sequence[Example]) -> None:
        tokens = sum(e.answer_length for e in batch)
        gradients: dict[tuple[str, str], Tensor] = {}

        def perturb(site: Site, x: Tensor, y: Tensor) -> Tensor | None:
            f = self.factors[site.name]
            return self.probe.scaling * (x.float() @ f["A"].T) @ f["B"].T if f else None

        def observe(site: Site, x: Tensor, d: Tensor) -> None:
            for values in per_example(self.probe, self.operands[site.name], x, d):
                for name, value in values.items():
                    key = (site.name, name)
                    gradients[key] = gradients.get(key, 0) + value.sum(0)

        with tap(self.model, self.sites, forward=perturb, backward=observe):
            answers, _ = answer_logits(self.model, collate(batch).to(self.model.device))
            loss = answers.nll_sum.sum() / tokens
            if loss.requires_grad:  # else no token was routed to any of the experts that are listened to
                loss.backward()
        self.tokens += tokens
        for key, gradient in gradients.items():
            self.first[key] = self.first.get(key, 0) + gradient * tokens
            self.second[key] = self.second.get(key, 0) + gradient.square() * tokens

    def scores(self, score: str) -> SetMoments:
        """Zero for a site that no token reached (an expert)."""
        result: SetMoments = {}
        for site, factor, shape in ((s.name, *item) for s in self.sites for item in self.probe.shapes(s).items()):
            zero = torch.zeros(shape, device=self.model.device)
            first = self.first.get((site, factor), zero)
            value = self.second.get((site, factor), zero) / self.tokens
            if score == "variance":
                value = (value - (first / self.tokens).square()).clamp_min(0)
                if factor == "A":  # the second division by the count, once per product Var B @ Var A
                    value = value / self.tokens
            result.setdefault(site, {})[factor] = Moments(1, zero, value, zero)
        return result
