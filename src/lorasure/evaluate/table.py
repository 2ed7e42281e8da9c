"""METRICS: every score with what a report calls it and where it was published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .behaviour import perplexity, refusal_rate
from .membership import auc, privleak, tpr
from .metrics import (
    Score,
    exact_memorisation,
    extraction_strength,
    forget_quality,
    model_utility,
    normalised_probability,
    probability,
    truth_preference,
    truth_ratio,
)
from .representation import cka_score

TOFU = "https://arxiv.org/abs/2401.06121"
MUSE = "https://arxiv.org/abs/2407.06460"
OPEN_UNLEARNING = "https://arxiv.org/abs/2506.12618"


@dataclass(frozen=True)
class Metric:
    """A row of METRICS: what a report calls the score, where it was published, and the function of records."""

    title: str
    paper: str
    function: Callable[..., Score]


METRICS = {
    "probability": Metric("Probability", TOFU, probability),
    "normalised_probability": Metric("Probability among the wrong answers", TOFU, normalised_probability),
    "truth_ratio": Metric("Truth ratio", TOFU, truth_ratio),
    "truth_preference": Metric("Truth preferred to wrong answers", TOFU, truth_preference),
    "forget_quality": Metric("Forget quality (log10 p)", TOFU, forget_quality),
    "model_utility": Metric("Model utility", TOFU, model_utility),
    "exact_memorisation": Metric("Exact memorisation", OPEN_UNLEARNING, exact_memorisation),
    "extraction_strength": Metric("Extraction strength", OPEN_UNLEARNING, extraction_strength),
    "auc": Metric("Membership inference, AUC", "https://arxiv.org/abs/2112.03570", auc),
    "tpr": Metric("Membership inference, found at 1 % false alarms", "https://arxiv.org/abs/2112.03570", tpr),
    "privleak": Metric("PrivLeak (%)", MUSE, privleak),
    "refusal_rate": Metric("Refusal rate", "https://arxiv.org/abs/2308.01263", refusal_rate),
    "perplexity": Metric("Perplexity", "https://arxiv.org/abs/1602.02410", perplexity),
    "cka": Metric("Linear CKA", "https://arxiv.org/abs/1905.00414", cka_score),
}
