"""Own data: rows to forget and rows to keep, without paraphrases or wrong answers, and no retrained model needed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from ..data.examples import Row
from ..data.load import layout
from ..data.readers import check_disjoint, read_rows
from ..data.rows import brought_wrong
from ..errors import UsageError
from .evaluation import Evaluation
from .items import EvaluationSet, Generation
from .membership import auc, membership_scores, privleak
from .metrics import Score
from .settings import SuiteSettings
from .tofu import capped, common_scores, prefixed, utility

READS = ("forget", "retain", "holdout")
WRONG_ANSWERS = 5  # per row, as TOFU has
BORROWED = "wrong answers are those of other rows of the same kind, so the truth ratio is easier than TOFU's"


def load(settings: SuiteSettings) -> list[EvaluationSet]:
    """The sets `forget`, `retain` and `holdout`, as far as they were given."""
    if settings.forget is None:
        raise UsageError("--suite own needs --forget, the rows that should be forgotten.")
    generation = Generation(settings.new_tokens) if settings.generate else None
    found = []
    for name in READS:
        source = getattr(settings, name)
        if source is not None:
            rows = capped(read_rows(source, layout(settings)).rows, settings.max_rows)
            attacked = settings.holdout is not None and name != "retain"
            found.append(
                EvaluationSet(
                    name,
                    with_wrong_answers(rows, settings.seed),
                    generation,
                    membership=attacked,
                    gradient_norm=attacked and settings.gradient_norm,
                )
            )
    for one, other in combinations(found, 2):
        check_disjoint(one.rows, other.rows)
    return found


def with_wrong_answers(rows: Sequence[Row], seed: int) -> tuple[Row, ...]:
    """The rows, each with wrong answers drawn by `seed` from other rows of its kind, unless it brings its own.

    Running text gets none, nor does a row whose kind has no other answer. Repeated answers are drawn once.
    """
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row.kind, []).append(row.answer)
    return tuple(_with_others(row, sorted(set(answers[row.kind]) - {row.answer}), seed) for row in rows)


def _with_others(row: Row, others: Sequence[str], seed: int) -> Row:
    if row.kind == "text" or not others or brought_wrong(row):
        return row
    draw = random.Random(f"{seed}/{row.prompt}/{row.answer}")
    wrong = draw.sample(others, min(WRONG_ANSWERS, len(others)))
    return replace(row, extra={**row.extra, "perturbed_answer": wrong, "borrowed": True})


def score(evaluation: Evaluation, reference: Evaluation | None) -> dict[str, Score]:
    """All scores of the suite. Where wrong answers are borrowed, the scores that rest on them say so in `note`."""
    found = common_scores(evaluation, reference)
    if "holdout" in evaluation.sets:
        names = ("forget", "holdout")
        known = reference if reference and all(reference.has(name, "min_k") for name in names) else None
        sides = [membership_values(evaluation, known, name) for name in names]
        found |= prefixed("membership", membership_scores(*sides))
        retrained = known and auc(*(np.array(known.column(name, "min_k")) for name in names))
        found["privleak"] = privleak(found["membership_min_k_auc"], retrained)
        if reference and not known:
            found["privleak"] = replace(found["privleak"], reason="the reference was evaluated without --holdout")
    for name, without in (("model_utility", []), ("model_utility_without_rouge", ["rouge"])):
        found[name] = Score(None, 0, reason="no rows to keep were given (--retain)")
        if "retain" in evaluation.sets:
            offered = [] if evaluation.has("retain", "wrong_nll") else ["truth_ratio"]
            found[name] = utility(evaluation, kept=["retain"], without=[*without, *offered])
    if not evaluation.about["borrowed"]:
        return found
    noted = [name for name, score in found.items() if _compares(name, score)]
    return found | {name: replace(found[name], extra={**found[name].extra, "note": BORROWED}) for name in noted}


def _compares(name: str, score: Score) -> bool:
    """Whether a score rests on wrong answers: by its name, or by those of the parts of a utility."""
    parts: Any = score.extra.get("parts", ())
    return name == "forget_quality" or any("truth_" in part for part in (name, *parts))


def membership_values(evaluation: Evaluation, reference: Evaluation | None, name: str) -> dict[str, np.ndarray]:
    """Values of the membership attacks on a set, as far as measured: attack -> (n,), higher looks more learnt."""
    nll = np.array(evaluation.column(name, "nll"))
    stored = ("zlib", "min_k", "min_k_plus_plus")
    found = {field: np.array(evaluation.column(name, field)) for field in stored} | {"loss": -nll}
    if reference:
        found["reference"] = np.array(reference.column(name, "nll")) - nll
    if evaluation.has(name, "gradient_norm"):
        found["gradient_norm"] = -np.array(evaluation.column(name, "gradient_norm"))
    return found
