"""Does a model know a text? Records of the text and of a control -> scores and a verdict. No model here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.stats import mannwhitneyu

from ..data.examples import Example
from ..errors import DataError
from ..forward import Record
from .membership import auc, min_k_plus_plus
from .metrics import Score, exact_memorisation, extraction_strength

LEVEL = 0.05 / 3  # three comparisons with the control share an error of 5 % (Bonferroni)
REPRODUCED = 0.5  # completing more than half of an average answer is knowing it by heart

GIVEN = (
    "rows of --control. A difference says that the model has learnt the text, provided that the control is of the same "
    "kind, length and difficulty and that the model has never seen it"
)
MADE = (
    "made from the text: the same prompts and the same answers, each prompt with the answer of another row with a "
    "prompt much like it. A difference says that the model ties answers to their prompts, which it may have learnt or "
    "worked out from the prompts, so that only answers that it completes by itself count as known"
)


def exchanged(examples: Sequence[Example], max_length: int) -> list[Example]:
    """A control of the same prompts and answers: every prompt gets the answer of another example, each exactly once.

    Both sets then have the same prompts, answers and lengths, save what goes over `max_length`. Of all exchanges it is
    the one whose prompts are most alike in total, by the share of tokens that two prompts have in common (Jaccard), so
    that a new answer fits its prompt as well as any that is not its own. DataError if it cannot be done.
    """
    heads = [e.input_ids[: e.answer_start] for e in examples]
    answers = [e.input_ids[e.answer_start :] for e in examples]
    likeness = _likeness(heads)
    number = {answer: index for index, answer in enumerate(dict.fromkeys(answers))}
    which = np.array([number[answer] for answer in answers])
    likeness[which[:, None] == which] = -np.inf  # its own answer, or one that reads the same, is no control
    try:
        _, other = linear_sum_assignment(likeness, maximize=True)
    except ValueError:
        raise DataError(
            "A control cannot be made from these rows: too few different answers. Give --control."
        ) from None
    pairs = zip(examples, heads, other, strict=True)
    return [
        replace(example, input_ids=(*head, *answers[j])[:max_length], fragment=examples[j].fragment)
        for example, head, j in pairs
    ]


def _likeness(heads: Sequence[Sequence[int]]) -> np.ndarray:
    """Share of distinct tokens in common, (n, n) in [0, 1]; 0 for two empty prompts."""
    sets = [sorted(set(head)) for head in heads]
    ends = np.cumsum([0, *map(len, sets)])
    held = csr_matrix((np.ones(ends[-1]), [t for s in sets for t in s], ends))
    common = (held @ held.T).toarray()
    sizes = common.diagonal()
    union = sizes[:, None] + sizes - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def known_scores(text: Sequence[Record], control: Sequence[Record], *, given: bool) -> dict[str, Score]:
    """Exact memorisation and extraction strength of both, the AUC of Min-K++ between them, and the verdict.

    `p` of each is the one-sided Mann-Whitney test of the text's rows against the control's. `given`: the control is of
    rows that the model cannot know, not `exchanged`. The verdict is 1 (known), 0 (nothing found) or undefined; its
    `text` says so in words and its `control` says what the control is and what follows from it.
    """
    scores: dict[str, Score] = {}
    tests: dict[str, float] = {}
    for metric in (exact_memorisation, extraction_strength):
        name, sides = metric.__name__, [[r.correct for r in side] for side in (text, control)]
        scores[name], scores[f"{name}_control"] = map(metric, sides)
        tests[name] = _p(*([metric([flags]).value for flags in side] for side in sides))
    attack = [
        min_k_plus_plus([r.log_probs for r in side], [r.expected for r in side], [r.variance for r in side])
        for side in (text, control)
    ]
    scores["min_k_plus_plus_auc"], tests["min_k_plus_plus_auc"] = auc(*attack), _p(*attack)
    for name, p in tests.items():
        scores[name] = replace(scores[name], extra=scores[name].extra | {"p": p, "note": f"p = {p:.2g}"})
    value, said = _judged(scores, min(tests.values()) < LEVEL, given)
    if comb(len(text) + len(control), len(text)) < 1 / LEVEL:
        said += " So few rows cannot show a difference."
    words: dict[str, object] = {"text": said, "control": GIVEN if given else MADE}
    return scores | {
        "verdict": Score(value, len(text), extra=words, reason="undecided, see text" if value is None else None)
    }


def _p(ours: Any, theirs: Any) -> float:
    """One-sided Mann-Whitney test that values of the text lie above those of the control."""
    return float(mannwhitneyu(ours, theirs, alternative="greater").pvalue)


def _judged(scores: Mapping[str, Score], differs: bool, given: bool) -> tuple[float | None, str]:
    """The verdict's value, and in words."""
    strength, control = scores["extraction_strength"], scores["extraction_strength_control"]
    figures = f"It completes {strength.value:.0%} of an average answer by itself ({control.value:.0%} in the control)."
    low = strength.value if strength.low is None else strength.low
    reproduced = low is not None and low > REPRODUCED
    if differs and (given or reproduced):
        return 1.0, f"Known: the model has learnt this text. {figures}"
    if differs:
        return None, (
            f"Undecided: the model prefers each answer to the exchanged one, but does not know it by heart. {figures} "
            "It has learnt the text, or works answers out from prompts: a --control that it cannot know would tell."
        )
    if reproduced:
        return None, (
            f"Undecided: the model completes this text by itself, but it does not stand out from the control. {figures}"
            " It knows both, or both are easy to guess: another --control would tell."
        )
    high = scores["min_k_plus_plus_auc"].high
    left = "" if high is None else f" An AUC of up to {high:.2f} remains possible."
    return 0.0, f"Nothing found: no sign that the model knows this text, which is no proof. {figures}{left}"
