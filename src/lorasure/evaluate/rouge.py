"""ROUGE-L, by Google's `rouge-score`, whose numbers the published tables are made with."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _scorer(stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=stem)


def rouge_l(answer: str, generated: str, *, stem: bool = True) -> tuple[float, float]:
    """(recall, F1) of the longest common subsequence of words, both in [0, 1]. No word in common gives 0.

    Recall of stemmed words is TOFU's score (arXiv 2401.06121), F1 of words as they are MUSE's (arXiv 2407.06460).
    """
    found = _scorer(stem).score(answer, generated)["rougeL"]
    return float(found.recall), float(found.fmeasure)
