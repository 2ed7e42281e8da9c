"""Which trial counts as best: pure functions of scores that need no retrained model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

COMPLETE = "complete"
Values = Mapping[str, float]
MEASURED = {  # name here -> name in a suite's scores
    "extraction_strength": "forget_extraction_strength",
    "forget_probability": "forget_probability",
    "utility": "model_utility_without_rouge",
}
PREFERENCE = "truth_preference"  # measured as well where the rows bring wrong answers
NO_PREFERENCE = 0.5
NO_LEVEL = {"extraction_strength": 0.0}  # where there are no wrong answers


def known(scores: Values, level: Values) -> float:
    """How much of the forget set is still known, in [0, 1], less is better: the measure that selects.

    The mean of extraction strength, probability and truth preference, each no lower than its `level`. Of the first two
    that is what the original model shows on wrong answers to the same questions, text that it cannot know. Unbounded,
    they would reward forgetting too much: both fall far below what a model shows that never saw the text (extraction
    strength because a loss such as ihl lets no right token be the most probable), and forget quality and membership
    attacks see that. The third has a level of 1/2, no preference, and sees what is still known in other words. Without
    wrong answers extraction strength alone counts, which at least ends at 0.
    """
    return sum(max(scores[name], least) for name, least in level.items()) / len(level)


def keeps(scores: Values, floor: float) -> bool:
    """Whether a candidate has at least the floor's share of the original model's utility."""
    return scores["share"] >= floor


def objective(scores: Values, level: Values, floor: float) -> float:
    """What a sampler minimises: what is still known; above 1, and more the less is kept, below the floor."""
    return known(scores, level) if keeps(scores, floor) else 1 + floor - scores["share"]


def chosen(trials: Iterable[Mapping[str, Any]], level: Values, floor: float) -> Mapping[str, Any] | None:
    """The best of one method's trials (lines of trials.jsonl) among those that keep enough; None if none does.

    At the same `known` the one that keeps more. Forget quality, which needs a retrained model, is not looked at.
    """
    fit = [t for t in trials if t["state"] == COMPLETE and keeps(t["scores"], floor)]
    return min(fit, key=lambda t: (known(t["scores"], level), -t["scores"]["utility"], t["trial"]), default=None)
