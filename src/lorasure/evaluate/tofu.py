"""TOFU's scores from records of its four evaluation sets (arXiv 2401.06121), generation left out."""

from __future__ import annotations

from collections.abc import Mapping

from .collect import ChoiceRecords
from .metrics import (
    Score,
    extraction_strength,
    forget_quality,
    model_utility,
    normalised_probability,
    probability,
    truth_ratio,
    truth_ratio_values,
)

SEEDS = {"forget": 0, "retain": 1, "real_authors": 2, "world_facts": 3}  # bootstrap: one per set


def ratios(records: ChoiceRecords, mean: str = "geometric") -> list[float]:
    """Truth ratio R per row; `mean` as in `truth_ratio_values`."""
    return list(truth_ratio_values(records.paraphrase, records.wrong, mean=mean))


def utility(sets: Mapping[str, ChoiceRecords], mean: str = "geometric") -> Score:
    """Harmonic mean of probability and truth ratio over the sets given, without ROUGE.

    `retain` counts the answer's own probability, every other set its probability among the answers offered. `mean`: the
    truth ratio's. TOFU's tables take the geometric one, its in-training evaluation the arithmetic one: say which.
    """
    parts = {}
    for name, records in sets.items():
        seed = SEEDS.get(name, 0)
        if name == "retain":
            parts[f"{name} probability"] = probability(records.true, seed=seed)
        else:
            parts[f"{name} probability"] = normalised_probability(records.true, records.wrong, seed=seed)
        parts[f"{name} truth ratio"] = truth_ratio(ratios(records, mean), forget=False, seed=seed)
    return model_utility(parts)


def forget_scores(records: ChoiceRecords, reference: ChoiceRecords | None) -> dict[str, Score]:
    """Scores of the forget set; `forget_quality` needs the records of a model that never saw it."""
    scores = {
        "probability": probability(records.true),
        "truth_ratio": truth_ratio(ratios(records), forget=True),
        "extraction_strength": extraction_strength(records.correct),
    }
    if reference is None:
        scores["forget_quality"] = Score(None, len(records.true), reason="no retrained reference was given")
    else:
        scores["forget_quality"] = forget_quality(ratios(records), ratios(reference))
    return scores
