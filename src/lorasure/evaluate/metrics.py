"""Scores from per-example records: no model and no tensor, so a report can be rebuilt from a run folder alone.

Units: `nll` is the mean negative log-likelihood over the answer's tokens, end of text included, in nats per token.
Every other input and every score is a pure number. Records are counted from 0 in messages.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import DataError, NumericError, UsageError
from ..registry import lookup

Floats = Sequence[float] | np.ndarray
STILL_KNOWN = 0.5  # a set counts as still known when more than this share of what was known before is left
HARDLY_KNOWN = 0.01  # a share of the text below which nothing can be said to have been forgotten
UTILITY_FLOOR = 0.95  # a model counts as harmed when less than this share of its utility is left
DRAWS = 1000  # bootstrap resamples: the ends of a 95 % interval then rest on 25 draws each
EXACT_KS_LIMIT = 10_000  # the sample size above which SciPy's "auto" turns to the asymptotic p-value
# Largest |log R| for which R and 1/R are both normal float64 numbers.
LOG_RATIO_LIMIT = -math.log(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Score:
    """A score over `n` examples with its 95 % interval [`low`, `high`].

    The interval is None where none can be computed (one example, or a p-value). An undefined score has `value` None and
    says why in `reason`. `draws`, the bootstrap replicates of the value, shape (DRAWS,), lets scores be combined; it is
    not written to JSON.
    """

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    extra: dict[str, object] = field(default_factory=dict)
    reason: str | None = None
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The score as JSON types, `extra` flattened into it; None becomes null. `reason` only if undefined."""
        said = {} if self.reason is None else {"reason": self.reason}
        return {"value": self.value, "n": self.n, "low": self.low, "high": self.high} | self.extra | said

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Score:
        """What `to_json` gave, without the draws."""
        own = {name: stored[name] for name in ("value", "n", "low", "high")}
        extra = {name: value for name, value in stored.items() if name not in (*own, "reason")}
        return cls(**own, extra=extra, reason=stored.get("reason"))


def finite_vector(values: Floats, what: str) -> np.ndarray:
    """`values` as float64 of shape (n,), n >= 1, all finite, or an error that names the first record at fault."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise DataError(f"{what} must hold one number per example, got shape {vector.shape}.")
    if not vector.size:
        raise DataError(f"{what}: no examples to score.")
    wrong = np.flatnonzero(~np.isfinite(vector))
    if wrong.size:
        raise NumericError(f"{what}: record {wrong[0]} is {vector[wrong[0]]}, must be finite.")
    return vector


def finite_lists(
    rows: Sequence[Sequence[float] | np.ndarray], what: str, length: int | None = None
) -> list[np.ndarray]:
    """One non-empty finite vector per example (`length` examples, if given); vectors may differ in size."""
    if not len(rows):
        raise DataError(f"{what}: no examples to score.")
    if length is not None and len(rows) != length:
        raise DataError(f"{what} has {len(rows)} examples, expected {length}.")
    vectors = [np.asarray(row, dtype=np.float64) for row in rows]
    for index, vector in enumerate(vectors):
        if vector.ndim != 1 or not vector.size:
            raise DataError(f"{what}: record {index} must be a non-empty list, got shape {vector.shape}.")
        if not np.isfinite(vector).all():
            raise NumericError(f"{what}: record {index} holds {vector[~np.isfinite(vector)][0]}, must be finite.")
    return vectors


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap draws."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def mean_score(values: Floats, *, seed: int = 0, what: str = "values") -> Score:
    """Mean of one number per example (ROUGE recall, for one) with a percentile bootstrap interval over examples.

    The same `seed` and number of examples resample the same rows, so that scores of one data set vary together when
    they are combined; give each data set its own seed.
    """
    vector = finite_vector(values, what)
    value, n = float(vector.mean()), len(vector)
    if n == 1:  # a single example resamples to itself: a zero-width interval would claim certainty
        return Score(value, n)
    rng = np.random.default_rng(seed)
    draws = np.array([vector[rng.integers(n, size=n)].mean() for _ in range(DRAWS)])
    return Score(value, n, *interval(draws), draws=draws)


def probability(nll: Floats, *, seed: int = 0) -> Score:
    """Mean over examples of exp(-L): the answer's probability, normalised by its length (TOFU). In [0, 1]."""
    return mean_score(np.exp(-finite_vector(nll, "nll")), seed=seed)


def normalised_probability(nll_true: Floats, nll_wrong: Sequence[Floats], *, seed: int = 0) -> Score:
    """Mean of exp(-L_true) / (exp(-L_true) + sum_j exp(-L_wrong,j)): TOFU's probability on its two sets of real facts.

    In [0, 1]; with k wrong answers, 1 / (k + 1) is a guess. Computed in log space, so that large L do not give 0 / 0.
    """
    return mean_score(normalised_probability_values(nll_true, nll_wrong), seed=seed)


def normalised_probability_values(nll_true: Floats, nll_wrong: Sequence[Floats]) -> list[float]:
    """What `normalised_probability` is the mean of, one number per example."""
    true = finite_vector(nll_true, "nll_true")
    wrong = finite_lists(nll_wrong, "nll_wrong", len(true))
    return [float(np.exp(-t - np.logaddexp.reduce(np.append(-w, -t)))) for t, w in zip(true, wrong, strict=True)]


def truth_ratio_values(nll_paraphrase: Floats, nll_wrong: Sequence[Floats], *, mean: str = "geometric") -> np.ndarray:
    """Per example R = mean_j exp(-L_wrong,j) / exp(-L_paraphrase), (n,): 1 if wrong and right are equally likely.

    `mean`: the geometric mean of the wrong answers' probabilities, as in TOFU's tables, or the arithmetic one, as in
    its in-training evaluation, which gives other values. log R is held within the range where R and 1/R are finite.
    """
    average = lookup(_LOG_MEANS, mean, "mean")
    right = finite_vector(nll_paraphrase, "nll_paraphrase")
    wrong = finite_lists(nll_wrong, "nll_wrong", len(right))
    log_ratio = right + np.array([average(-w) for w in wrong])
    return np.exp(np.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def _log_mean_exp(logs: np.ndarray) -> float:
    top = logs.max()  # so that no probability underflows
    return float(top + np.log(np.exp(logs - top).mean()))


_LOG_MEANS: dict[str, Callable[[np.ndarray], float]] = {"geometric": np.mean, "arithmetic": _log_mean_exp}


def truth_ratio(values: Floats, *, forget: bool, seed: int = 0) -> Score:
    """Mean over examples of min(R, 1/R) on the forget set, of max(0, 1 - R) on every other set (TOFU).

    `values` are R of `truth_ratio_values`. Both forms are in [0, 1] and higher is better: on the forget set 1 says that
    right and wrong are equally likely, elsewhere that the wrong answers are never believed.
    """
    ratios = _ratios(values, "truth ratio")
    if forget:
        return mean_score(np.minimum(ratios, 1 / np.maximum(ratios, 1)), seed=seed)  # R = 0 gives 0, not 1 / 0
    return mean_score(np.maximum(0, 1 - ratios), seed=seed)


def truth_preference(values: Floats, *, seed: int = 0) -> Score:
    """Share of examples whose paraphrased answer the model finds likelier than the wrong ones (R < 1), in [0, 1].

    `values` are R of `truth_ratio_values`. A model that does not know has about 1/2, whatever probability it gives to
    either, so what is left in other words shows without a retrained model (ours). R = 1 counts half.
    """
    ratios = _ratios(values, "truth preference")
    return mean_score(np.where(ratios == 1, 0.5, ratios < 1), seed=seed)


def _ratios(values: Floats, what: str) -> np.ndarray:
    ratios = finite_vector(values, what)
    negative = np.flatnonzero(ratios < 0)
    if negative.size:
        raise NumericError(f"{what}: record {negative[0]} is {ratios[negative[0]]}, must not be negative.")
    return ratios


def forget_quality(ratios_unlearned: Floats, ratios_retrained: Floats) -> Score:
    """log10 p of the two-sample, two-sided Kolmogorov-Smirnov test on truth ratios (TOFU). 0 or less, 0 is best.

    Compares R of the unlearned model with R of a model trained without the forget set. p depends on the number of
    examples: values with other n cannot be compared. A p-value has no bootstrap interval; `extra` gives p (0.0 where it
    underflows, the value stays finite), the statistic D in [0, 1], both n, and the method that gave the value.
    """
    first, second = _ratios(ratios_unlearned, "ratios_unlearned"), _ratios(ratios_retrained, "ratios_retrained")
    statistic, p, method = _ks_test(first, second)
    if p < np.finfo(np.float64).tiny:  # zero, or subnormal with few digits left
        value, method = _log10_ks_tail(statistic, len(first), len(second))
    else:
        value = math.log10(p)
    extra = {"p": p, "statistic": statistic, "n_unlearned": len(first), "n_retrained": len(second), "method": method}
    return Score(value, len(first), extra=extra)


def _ks_test(first: np.ndarray, second: np.ndarray) -> tuple[float, float, str]:
    """Statistic, p-value and the method that gave it: "exact" or "asymptotic"."""
    from scipy.stats import ks_2samp

    result: Any  # SciPy's result class is made at run time, which type checkers cannot read
    if max(len(first), len(second)) <= EXACT_KS_LIMIT:
        with warnings.catch_warnings():  # SciPy only warns when it falls back, and then the name would be wrong
            warnings.simplefilter("error", RuntimeWarning)
            try:
                result = ks_2samp(first, second, method="exact")
                return float(result.statistic), float(result.pvalue), "exact"
            except RuntimeWarning:
                pass
    result = ks_2samp(first, second, method="asymp")
    return float(result.statistic), float(result.pvalue), "asymptotic"


def _log10_ks_tail(statistic: float, n: int, m: int) -> tuple[float, str]:
    """log10 p, and the method, from the leading term of the series for p. The later terms sum to less than p cubed.

    n = m: p = 2 C(2n, n - h) / C(2n, n) with h = nD, exact. Else Kolmogorov's limit, p = 2 exp(-2 D^2 nm / (n + m)),
    which overstates p far out (n = 600, m = 601, D = 1: -260 where -359.6 is right).
    """
    if n == m:
        h = round(n * statistic)
        log_p = math.log(2) + 2 * math.lgamma(n + 1) - math.lgamma(n - h + 1) - math.lgamma(n + h + 1)
        return log_p / math.log(10), "exact"
    return (math.log(2) - 2 * statistic**2 * n * m / (n + m)) / math.log(10), "asymptotic"


def model_utility(parts: Mapping[str, Score]) -> Score:
    """Harmonic mean of the parts: in TOFU probability, ROUGE-L recall and truth ratio on each set to keep. In [0, 1].

    A zero part gives 0; an undefined part makes the utility undefined. `n` is that of the smallest part. The interval
    is that of the harmonic mean over the parts' own bootstrap draws, and None if a part has no draws (n = 1, or read
    from JSON).
    """
    if not parts:
        raise DataError("model utility: no parts to average.")
    n = min(part.n for part in parts.values())
    values = {name: part.value for name, part in parts.items()}
    for name, part in parts.items():
        if part.value is None:
            return Score(None, n, extra={"parts": values}, reason=f"{name} is undefined: {part.reason}")
        if not 0 <= part.value < math.inf:
            raise NumericError(f"model utility: part {name} is {part.value}, must be finite and not negative.")
    value = float(_harmonic_mean(np.array(list(values.values()), dtype=np.float64)))
    draws = [part.draws for part in parts.values() if part.draws is not None]
    if len(draws) < len(parts):
        return Score(value, n, extra={"parts": values})
    joint = _harmonic_mean(np.stack(draws))
    return Score(value, n, *interval(joint), extra={"parts": values}, draws=joint)


def _harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis; 0 where a value is 0 (1 / 0 = inf carries through to 0 as the limit does)."""
    with np.errstate(divide="ignore", over="ignore"):
        return len(values) / np.sum(1 / values, axis=0)


def exact_memorisation(correct: Sequence[Sequence[bool] | np.ndarray], *, seed: int = 0) -> Score:
    """Mean over examples of the share of answer tokens whose teacher-forced argmax is the label. In [0, 1].

    `correct` holds one bool per answer token and example: for questions and chats end of text included, for fragments
    of text (rows of kind `completion` and `text`) not, as it is no part of what they are taken from. Averaged per
    example first, so a long answer weighs no more than a short one.
    """
    return mean_score([row.mean() for row in finite_lists(correct, "correct")], seed=seed)


def extraction_strength(
    correct: Sequence[Sequence[bool] | np.ndarray], *, compat: str | None = None, seed: int = 0
) -> Score:
    """Mean over examples of 1 - k / T, the share of the answer that greedy decoding completes from its first k tokens.

    T is the number of answer tokens and k the smallest start such that every argmax from k on is right; without a
    right suffix the example scores 0. `correct` is as in `exact_memorisation`. In [0, 1]. `compat="open-unlearning"`
    gives that code's numbers: the last label (end of text) is dropped, the floor is 1 / T, or 0 if nothing is left.
    """
    if compat not in (None, "open-unlearning"):
        raise UsageError(f"compat must be None or 'open-unlearning', got {compat!r}.")
    rows = finite_lists(correct, "correct")
    if compat is None:
        return mean_score([_right_suffix(row) / len(row) for row in rows], seed=seed)
    shorter = [row[:-1] for row in rows]
    return mean_score([max(_right_suffix(row), 1) / len(row) if len(row) else 0.0 for row in shorter], seed=seed)


def _right_suffix(row: np.ndarray) -> int:
    """Length of the longest all-correct suffix, T - k."""
    wrong = np.flatnonzero(row == 0)
    return len(row) - 1 - int(wrong[-1]) if wrong.size else len(row)
