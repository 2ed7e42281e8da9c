"""Membership inference: was a text among what the model learnt? Attacks on it, how well they tell, and PrivLeak.

An attack gives one number per example, higher where the text looks learnt. Columns are those of forward.Record: a list
per example with a number per answer token, end of text included, in nats. No model and no tensor here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, UsageError
from .metrics import DRAWS, Floats, Score, finite_lists, finite_vector, interval

Column = Sequence[Sequence[float] | np.ndarray]

K = 0.4  # share of the tokens that Min-K and Min-K++ look at, as in MUSE
VARIANCE_FLOOR = (
    1e-6  # nats squared, as published: below it the model is certain and rounding would be divided by itself
)


def loss(log_probs: Column) -> np.ndarray:
    """-L, the mean log-probability of the answer tokens, (n,)."""
    return np.array([row.mean() for row in finite_lists(log_probs, "log_probs")])


def zlib_ratio(log_probs: Column, texts: Sequence[str]) -> np.ndarray:
    """-L / bytes of zlib(text), (n,): L in nats per token against how much there is to know in the text, UTF-8."""
    if len(texts) != len(log_probs):
        raise DataError(f"texts has {len(texts)} examples, expected {len(log_probs)}.")
    return loss(log_probs) / [len(zlib.compress(text.encode())) for text in texts]


def min_k(log_probs: Column, *, k: float = K) -> np.ndarray:
    """Mean of the lowest share `k` of an answer's log-probabilities, one at least, (n,)."""
    return np.array([_lowest(row, k) for row in finite_lists(log_probs, "log_probs")])


def min_k_plus_plus(log_probs: Column, expected: Column, variance: Column, *, k: float = K) -> np.ndarray:
    """As `min_k`, of (log p - mu) / sigma: log p as the model's own distribution at that token has it, (n,)."""
    rows = finite_lists(log_probs, "log_probs")
    means = finite_lists(expected, "expected", len(rows))
    variances = finite_lists(variance, "variance", len(rows))
    found = []
    for index, (row, mean, spread) in enumerate(zip(rows, means, variances, strict=True)):
        if not row.shape == mean.shape == spread.shape:
            raise DataError(f"record {index} has {len(row)}, {len(mean)} and {len(spread)} tokens; must be the same.")
        found.append(_lowest((row - mean) / np.sqrt(np.maximum(spread, VARIANCE_FLOOR)), k))
    return np.array(found)


def _lowest(row: np.ndarray, k: float) -> float:
    if not 0 < k <= 1:
        raise UsageError(f"k must be above 0 and at most 1, got {k}.")
    return float(np.sort(row)[: max(1, int(k * len(row)))].mean())


def reference(log_probs: Column, reference_log_probs: Column) -> np.ndarray:
    """L_reference - L, (n,): how much better the model knows the answer than one that has not learnt it."""
    known = loss(log_probs)
    return known - [row.mean() for row in finite_lists(reference_log_probs, "reference_log_probs", len(known))]


def gradient_norm(norms: Floats) -> np.ndarray:
    """Minus the norm of the gradient of L, (n,): what has been learnt no longer pulls on the weights."""
    return -finite_vector(norms, "norms")


@dataclass(frozen=True)
class Attack:
    """A row of MEMBERSHIP: `function` of columns of the records, and what to say when it was not run."""

    title: str
    paper: str
    function: Callable[..., np.ndarray]
    unless: str = "not measured"


MEMBERSHIP = {
    "loss": Attack("LOSS", "https://arxiv.org/abs/1709.01604", loss),
    "zlib": Attack("zlib", "https://arxiv.org/abs/2012.07805", zlib_ratio),
    "min_k": Attack("Min-K", "https://arxiv.org/abs/2310.16789", min_k),
    "min_k_plus_plus": Attack("Min-K++", "https://arxiv.org/abs/2404.02936", min_k_plus_plus),
    "reference": Attack(
        "Reference model", "https://arxiv.org/abs/2012.07805", reference, "no reference model was given (--reference)"
    ),
    "gradient_norm": Attack(
        "Gradient norm", "https://arxiv.org/abs/1812.00910", gradient_norm, "not measured (--gradient-norm)"
    ),
}


def membership_scores(learnt: Mapping[str, Floats], unseen: Mapping[str, Floats], *, seed: int = 0) -> dict[str, Score]:
    """`NAME_auc` and `NAME_tpr` (at 1 % false positives) of every attack, the forget set against rows never learnt.

    Both mappings go from the name of an attack to its values. An attack that was not run is undefined.
    """
    scores = {}
    for name in MEMBERSHIP:
        if name in learnt and name in unseen:
            sides = learnt[name], unseen[name]
            scores |= {f"{name}_auc": auc(*sides, seed=seed), f"{name}_tpr": tpr(*sides, seed=seed)}
        else:
            undefined = Score(None, 0, reason=MEMBERSHIP[name].unless)
            scores |= {f"{name}_auc": undefined, f"{name}_tpr": undefined}
    return scores


def auc(learnt: Floats, unseen: Floats, *, seed: int = 0) -> Score:
    """Probability that an attack ranks a learnt example above an unseen one, ties one half: the area under the ROC.

    In [0, 1], 1/2 if the attack cannot tell. n is the number of learnt examples, `n_unseen` that of the others. The
    bootstrap interval resamples each set for itself.
    """
    return _bootstrap(_area, learnt, unseen, seed)


def tpr(learnt: Floats, unseen: Floats, *, seed: int = 0) -> Score:
    """Share of the learnt examples that an attack finds when at most 1 % of the unseen ones are accused.

    In [0, 1] (arXiv 2112.03570). With fewer than 100 unseen examples none of them may be. Interval as in `auc`.
    """
    return _bootstrap(_found, learnt, unseen, seed)


def _area(learnt: np.ndarray, unseen: np.ndarray) -> float:
    ranked = np.sort(unseen)
    below, up_to = (np.searchsorted(ranked, learnt, side) for side in ("left", "right"))
    return float((below + up_to).sum() / (2 * len(learnt) * len(unseen)))


def _found(learnt: np.ndarray, unseen: np.ndarray) -> float:
    threshold = np.sort(unseen)[-1 - len(unseen) // 100]
    return float((learnt > threshold).mean())


def _bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], float], learnt: Floats, unseen: Floats, seed: int
) -> Score:
    first, second = finite_vector(learnt, "learnt"), finite_vector(unseen, "unseen")
    value, n, m = statistic(first, second), len(first), len(second)
    if min(n, m) == 1:  # as in mean_score: no claim of certainty from a single example
        return Score(value, n, extra={"n_unseen": m})
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(first[rng.integers(n, size=n)], second[rng.integers(m, size=m)]) for _ in range(DRAWS)])
    return Score(value, n, *interval(draws), extra={"n_unseen": m}, draws=draws)


def privleak(model: Score, retrained: Score | None) -> Score:
    """PrivLeak in percent (MUSE, arXiv 2407.06460), from the `auc` of the model and of one trained without the rows.

    (A - A_retrained) / A_retrained x 100 in MUSE's direction, where A = 1 - AUC is the probability that the holdout
    looks more learnt than the forget set: 0 as after retraining, -100 if all is still known, positive if forgetting
    went so far that it shows. Undefined without the retrained model, or where its A is 0. Give both AUCs the same seed:
    they are resampled together.
    """
    if retrained is None:
        return Score(None, model.n, reason="no retrained reference was given")
    sizes = [(score.n, score.extra.get("n_unseen")) for score in (model, retrained)]
    if sizes[0] != sizes[1]:
        raise DataError(f"privleak: the two AUCs are of {sizes[0]} and {sizes[1]} examples; must be the same rows.")
    if model.value is None or retrained.value is None:
        return Score(None, model.n, reason=model.reason or retrained.reason)
    extra: dict[str, object] = {"auc": model.value, "auc_retrained": retrained.value}
    if retrained.value == 1:
        return Score(None, model.n, extra=extra, reason="the retrained reference tells every row from the holdout")
    value = _percent(model.value, retrained.value)
    if model.draws is None or retrained.draws is None or (retrained.draws == 1).any():
        return Score(value, model.n, extra=extra)
    draws = _percent(model.draws, retrained.draws)
    return Score(value, model.n, *interval(draws), extra=extra, draws=draws)


def _percent(auc: Any, retrained: Any) -> Any:
    return ((1 - auc) - (1 - retrained)) / (1 - retrained) * 100
