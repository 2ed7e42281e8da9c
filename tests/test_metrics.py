"""Scores against published values, closed forms and properties; each test names what it is compared with."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasure.errors import DataError, NumericError, UsageError
from lorasure.evaluate import metrics
from lorasure.evaluate.metrics import Score
from lorasure.evaluate.table import METRICS

LOGS = Path(__file__).parents[2] / "shared" / "data" / "tofu_logs"
NLLS = st.lists(st.floats(0, 1e6), min_size=1, max_size=8)
ANSWERS = st.lists(st.booleans(), min_size=1, max_size=12)


def samples_with_distance(k: int, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Two samples of n whose distribution functions differ by k / n at most: the second is moved up by k ranks."""
    first = np.arange(float(n))
    return first, first + k - 0.5


# --- what every metric of records does

ONE_COLUMN = {
    "mean_score": metrics.mean_score,
    "probability": metrics.probability,
    "truth_ratio forget": lambda v: metrics.truth_ratio(v, forget=True),
    "truth_ratio retain": lambda v: metrics.truth_ratio(v, forget=False),
    "normalised_probability": lambda v: metrics.normalised_probability(v, [[1.0]] * len(v)),
    "truth_preference": metrics.truth_preference,
    "truth_ratio_values": lambda v: metrics.truth_ratio_values(v, [[1.0]] * len(v)),
    "forget_quality first": lambda v: metrics.forget_quality(v, [1.0]),
    "forget_quality second": lambda v: metrics.forget_quality([1.0], v),
    "exact_memorisation": lambda v: metrics.exact_memorisation([[x] for x in v]),
    "extraction_strength": lambda v: metrics.extraction_strength([[x] for x in v]),
}


@pytest.mark.parametrize("name", ONE_COLUMN)
def test_no_data_is_not_a_score(name):
    with pytest.raises(DataError, match="no examples"):
        ONE_COLUMN[name]([])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ONE_COLUMN)
def test_a_non_finite_record_is_named_and_never_averaged_away(name, bad):
    assert ONE_COLUMN[name]([0.5, 1.0]) is not None  # the same call passes without the bad record
    with pytest.raises(NumericError, match="record 1 "):
        ONE_COLUMN[name]([0.5, bad, math.nan])


def test_shapes_that_do_not_fit_are_data_errors():
    with pytest.raises(DataError, match="has 1 examples, expected 2"):
        metrics.normalised_probability([1.0, 2.0], [[1.0]])
    with pytest.raises(DataError, match="record 1 must be a non-empty list"):
        metrics.truth_ratio_values([1.0, 2.0], [[1.0], []])
    with pytest.raises(DataError, match="record 0 must be a non-empty list"):
        metrics.exact_memorisation([[]])
    with pytest.raises(DataError, match=r"got shape \(1, 2\)"):
        metrics.probability([[1.0, 2.0]])
    with pytest.raises(NumericError, match="record 1 holds nan"):
        metrics.truth_ratio_values([1.0, 1.0], [[1.0], [1.0, math.nan]])
    with pytest.raises(NumericError, match=r"record 1 is -0\.5, must not be negative"):
        metrics.truth_ratio([1.0, -0.5], forget=True)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_row_of_the_registry_is_documented(metric):
    assert metric.title and metric.paper.startswith("https://arxiv.org/abs/")
    assert metric.function.__doc__ and metric.function.__annotations__["return"] == "Score"


# --- intervals


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(0, 5))
def test_the_interval_holds_the_value_and_stays_within_the_records(values, seed):
    score = metrics.mean_score(values, seed=seed)
    assert score.low <= score.value <= score.high
    assert min(values) - 1e-12 <= score.low and score.high <= max(values) + 1e-12


def test_the_interval_agrees_with_the_normal_one_for_many_records():
    """Reference: mean +- 1.96 s / sqrt(n), the central limit theorem; half of s would fail the bound by far."""
    values = np.random.default_rng(0).normal(0.5, 0.1, 500)
    score = metrics.mean_score(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(500)
    assert score.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert score.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_interval_covers_the_true_mean_about_95_times_in_100():
    """Reference: the meaning of a 95 % interval, on 200 data sets; a 68 % interval would cover about 136."""
    rng = np.random.default_rng(1)
    scores = [metrics.mean_score(rng.random(60), seed=i) for i in range(200)]
    covered = sum(score.low <= 0.5 <= score.high for score in scores)
    assert 178 <= covered <= 199


def test_intervals_repeat_for_a_seed_and_only_for_it():
    values = np.linspace(0, 1, 17) ** 2
    first, again, other = (metrics.mean_score(values, seed=seed) for seed in (3, 3, 4))
    assert first == again and np.array_equal(first.draws, again.draws)
    assert (first.low, first.high) != (other.low, other.high)


def test_one_record_has_a_value_and_no_interval():
    score = metrics.probability([0.0])
    assert (score.value, score.n, score.low, score.high) == (1.0, 1, None, None)


def test_a_score_is_frozen_and_goes_to_json_and_back():
    score = metrics.forget_quality([0.1, 0.2, 0.9], [0.3, 0.4, 0.5])
    assert json.loads(json.dumps(score.to_json(), allow_nan=False)) == score.to_json()
    assert Score.from_json(metrics.probability([0.5, 1.0]).to_json()) == metrics.probability([0.5, 1.0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        score.value = 0.0


# --- probability


def test_probability_is_the_mean_of_exp_minus_nll():
    """By hand: (1/2 + 1/4) / 2. The exponential of the mean NLL, a common slip, gives .354."""
    score = metrics.probability([math.log(2), math.log(4)])
    assert score.value == pytest.approx(0.375) and score.n == 2
    assert score.value != pytest.approx(math.exp(-math.log(8) / 2), abs=0.01)


def test_normalised_probability_by_hand_and_far_from_underflow():
    """By hand: .5 / (.5 + .25 + .25), and .2 / (.2 + .2 + .6); adding 10^5 nats to every answer changes nothing."""
    true, wrong = [math.log(2), math.log(5)], [[math.log(4)] * 2, [math.log(5), -math.log(0.6)]]
    assert metrics.normalised_probability(true, wrong).value == pytest.approx((0.5 + 0.2) / 2)
    moved = metrics.normalised_probability([t + 1e5 for t in true], [[w + 1e5 for w in row] for row in wrong])
    assert moved.value == pytest.approx(0.35, rel=1e-9)


# --- truth ratio


def test_truth_ratio_is_geometric():
    """By hand: sqrt(.1 * .4) / .5 = .4; the arithmetic mean of TOFU's in-training evaluation gives .25 / .5 = .5."""
    ratio = metrics.truth_ratio_values([-math.log(0.5)], [[-math.log(0.1), -math.log(0.4)]])
    assert ratio == pytest.approx([0.4]) and ratio != pytest.approx([0.5])


def test_truth_preference_is_the_share_below_one_and_ties_count_half():
    assert metrics.truth_preference([0.5, 0.9, 1.0, 4.0]).value == pytest.approx(2.5 / 4)
    assert metrics.truth_preference([1.0]).value == 0.5


def test_truth_ratio_scores_by_hand():
    assert metrics.truth_ratio([0.5, 4.0], forget=True).value == pytest.approx((0.5 + 0.25) / 2)
    assert metrics.truth_ratio([0.5, 4.0], forget=False).value == pytest.approx((0.5 + 0) / 2)
    assert metrics.truth_ratio([0.0], forget=True).value == 0


@given(NLLS, st.floats(0, 1e6))
def test_truth_ratio_is_finite_and_both_scores_are_within_0_and_1(wrong, right):
    ratios = metrics.truth_ratio_values([right], [wrong])
    assert np.isfinite(ratios).all() and np.isfinite(1 / ratios).all() and (ratios > 0).all()
    for forget in (True, False):
        assert 0 <= metrics.truth_ratio(ratios, forget=forget).value <= 1


@given(st.floats(0, 600), st.floats(0, 600))
def test_the_forget_score_does_not_tell_a_ratio_from_its_inverse(a, b):
    there = metrics.truth_ratio(metrics.truth_ratio_values([a], [[b]]), forget=True)
    back = metrics.truth_ratio(metrics.truth_ratio_values([b], [[a]]), forget=True)
    assert there.value == pytest.approx(back.value, rel=1e-9)


# --- forget quality

# log10 p of the exact two-sample test at n = 40 and D = k / 40.
GOLDEN = {8: -0.39, 10: -0.78, 12: -1.27, 13: -1.54, 14: -1.84, 15: -2.17, 16: -2.52, 18: -3.30, 20: -4.18}


@pytest.mark.parametrize(("k", "log_p"), GOLDEN.items())
def test_forget_quality_at_forty_examples(k, log_p):
    """The asymptotic p-value would miss these: at k = 20 it is off by more than .05."""
    score = metrics.forget_quality(*samples_with_distance(k))
    assert score.value == pytest.approx(log_p, abs=0.005)
    assert score.extra["statistic"] == pytest.approx(k / 40) and score.extra["method"] == "exact"
    assert score.extra["p"] == pytest.approx(10**score.value)
    assert (score.n, score.extra["n_unlearned"], score.extra["n_retrained"]) == (40, 40, 40)


def test_equal_samples_give_zero():
    assert metrics.forget_quality([0.1, 0.5, 0.9], [0.9, 0.1, 0.5]).value == 0


@given(st.permutations(list(range(12))), st.permutations(list(range(12))))
def test_forget_quality_ignores_order_and_which_sample_comes_first(first, second):
    a, b = np.linspace(0, 1, 12), np.linspace(0.3, 1.1, 12) ** 2
    score = metrics.forget_quality(a[first], b[second])
    assert score == metrics.forget_quality(a, b)
    assert score.value == metrics.forget_quality(b, a).value


def test_forget_quality_is_the_same_for_the_logarithm_and_the_inverse():
    """Only ranks count, so open-unlearning's test on 1/R agrees with TOFU's on R."""
    a, b = np.random.default_rng(0).lognormal(0, 1, 30), np.random.default_rng(1).lognormal(0.5, 1, 30)
    assert metrics.forget_quality(1 / a, 1 / b).value == pytest.approx(metrics.forget_quality(a, b).value)


@pytest.mark.parametrize("n", [600, 2000])
def test_forget_quality_stays_finite_where_p_underflows(n):
    """Reference: p = 2 n! n! / (2n)! for samples that do not overlap, in whole numbers of any size."""
    score = metrics.forget_quality(np.arange(float(n)), np.arange(float(n)) + n)
    exact = math.log10(2) + 2 * math.log10(math.factorial(n)) - math.log10(math.factorial(2 * n))
    assert score.extra["p"] == 0.0 and score.extra["method"] == "exact"
    assert score.value == pytest.approx(exact, rel=1e-10)
    json.dumps(score.to_json(), allow_nan=False)


@pytest.mark.parametrize("distance", [0.3, 0.5, 1.0])
def test_the_tail_formula_continues_scipy_where_both_work(distance):
    """Reference: SciPy's exact p-value at n = 400, before it underflows."""
    score = metrics.forget_quality(*samples_with_distance(int(400 * distance), 400))
    assert score.extra["p"] > 0
    assert metrics._log10_ks_tail(distance, 400, 400)[0] == pytest.approx(score.value, rel=1e-6)


def test_the_method_is_named_when_the_sizes_differ_or_are_large():
    apart = metrics.forget_quality(np.arange(600.0), np.arange(601.0) + 600)
    assert apart.extra["method"] == "asymptotic" and -400 < apart.value < -200
    many = metrics.EXACT_KS_LIMIT + 1
    assert metrics.forget_quality(*samples_with_distance(100, many)).extra["method"] == "asymptotic"


def test_the_method_is_named_when_scipy_falls_back(monkeypatch):
    import scipy.stats._stats_py as inside

    monkeypatch.setattr(inside, "_attempt_exact_2kssamp", lambda n, m, g, d, side: (False, d, math.nan))
    score = metrics.forget_quality(*samples_with_distance(20))
    assert score.extra["method"] == "asymptotic"
    assert abs(score.value - GOLDEN[20]) > 0.05


def log_ratios(model: str) -> tuple[np.ndarray, np.ndarray]:
    """R from the losses in a TOFU log, and R as the log itself stores it."""
    log = json.loads((LOGS / model / "eval_log_aggregated.json").read_text())["eval_log_forget.json"]
    rows = list(log["avg_paraphrased_loss"])
    right = [log["avg_paraphrased_loss"][row] for row in rows]
    wrong = [log["average_perturb_loss"][row] for row in rows]
    return metrics.truth_ratio_values(right, wrong), np.array([log["truth_ratio"][row] for row in rows])


@pytest.mark.skipif(not LOGS.is_dir(), reason="the TOFU logs are not beside the checkout")
def test_forget_quality_of_the_published_phi_logs():
    """Reference: the value published with TOFU for Phi-1.5, all data against 90 %, and R in the logs themselves."""
    (full, full_stored), (retain, retain_stored) = log_ratios("phi_full"), log_ratios("phi_retain90")
    assert full == pytest.approx(full_stored, rel=1e-4) and retain == pytest.approx(retain_stored, rel=1e-4)
    score = metrics.forget_quality(full, retain)
    assert score.value == pytest.approx(-15.66, abs=0.005)
    assert score.extra["statistic"] == pytest.approx(0.3467, abs=5e-5) and score.n == 300
    assert metrics.forget_quality(full[:200], retain[:200]).value > -15  # p depends on n


# --- model utility


def test_model_utility_is_the_harmonic_mean():
    """By hand: 3 / (1/.5 + 1/.25 + 1/1) = 3/7; the arithmetic mean is .583."""
    parts = {name: metrics.mean_score([value] * 4) for name, value in (("a", 0.5), ("b", 0.25), ("c", 1.0))}
    score = metrics.model_utility(parts)
    assert score.value == pytest.approx(3 / 7) and score.n == 4
    assert score.low == pytest.approx(3 / 7) == score.high
    assert score.extra == {"parts": {"a": 0.5, "b": 0.25, "c": 1.0}}


def test_the_utility_interval_agrees_with_the_delta_method():
    """Reference: error propagation, dH/da = H^2 / (2 a^2), for two independent parts."""
    rng = np.random.default_rng(2)
    a, b = rng.uniform(0.2, 0.6, 400), rng.uniform(0.5, 1.0, 300)
    score = metrics.model_utility({"a": metrics.mean_score(a), "b": metrics.mean_score(b, seed=1)})
    slope = [score.value**2 / (2 * x.mean() ** 2) * x.std(ddof=1) / math.sqrt(len(x)) for x in (a, b)]
    assert score.high - score.low == pytest.approx(2 * 1.96 * math.hypot(*slope), rel=0.1)
    assert score.low < score.value < score.high


def test_parts_over_the_same_examples_are_resampled_together():
    """a + b = 1 in every record: together the harmonic mean hardly moves, apart (another seed) it does."""
    a = np.random.default_rng(3).uniform(0.3, 0.7, 100)
    together, apart = (
        metrics.model_utility({"a": metrics.mean_score(a), "b": metrics.mean_score(1 - a, seed=seed)})
        for seed in (0, 1)
    )
    assert together.high - together.low < 0.2 * (apart.high - apart.low)


def test_a_zero_part_gives_zero_and_an_undefined_one_gives_none():
    one, zero = metrics.mean_score([1.0, 1.0]), metrics.mean_score([0.0, 0.0])
    assert metrics.model_utility({"a": one, "b": zero}).value == 0
    undefined = metrics.model_utility({"a": one, "rouge": Score(None, 2, reason="no generations")})
    assert undefined.value is None and undefined.reason == "rouge is undefined: no generations"


def test_utility_without_draws_has_no_interval_and_bad_parts_raise():
    read_back = Score.from_json(metrics.mean_score([0.2, 0.4]).to_json())
    score = metrics.model_utility({"a": read_back})
    assert score.value == pytest.approx(0.3) and score.low is None and score.high is None
    with pytest.raises(DataError, match="no parts"):
        metrics.model_utility({})
    with pytest.raises(NumericError, match=r"part a is -0\.5"):
        metrics.model_utility({"a": Score(-0.5, 1)})
    with pytest.raises(NumericError, match="part a is nan"):
        metrics.model_utility({"a": Score(math.nan, 1)})


# --- memorisation


def slow_extraction_strength(row: list[bool], compat: bool) -> float:
    """The definition, read off word by word: try every start."""
    row = row[:-1] if compat else row
    starts = [k for k in range(len(row)) if all(row[k:])]
    if not row or not (starts or compat):
        return 0.0
    return 1 - (starts[0] if starts else len(row) - 1) / len(row)


def test_exact_memorisation_averages_per_example_first():
    """By hand: (1/2 + 1) / 2; over all tokens together it would be 5/6."""
    assert metrics.exact_memorisation([[True, False], [True] * 4]).value == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("row", "value", "compat"),
    [("1111", 1.0, 1.0), ("0111", 0.75, 2 / 3), ("1101", 0.25, 1 / 3), ("1110", 0.0, 1.0), ("0000", 0.0, 1 / 3)],
)
def test_extraction_strength_by_hand(row, value, compat):
    correct = [[c == "1" for c in row]]
    assert metrics.extraction_strength(correct).value == pytest.approx(value)
    assert metrics.extraction_strength(correct, compat="open-unlearning").value == pytest.approx(compat)


@given(st.lists(ANSWERS, min_size=1, max_size=4))
def test_extraction_strength_agrees_with_its_definition(rows):
    for compat in (None, "open-unlearning"):
        expected = np.mean([slow_extraction_strength(row, compat is not None) for row in rows])
        assert metrics.extraction_strength(rows, compat=compat).value == pytest.approx(expected)


@given(ANSWERS, st.data())
def test_one_more_right_token_never_lowers_the_scores(row, data):
    better = list(row)
    better[data.draw(st.integers(0, len(row) - 1))] = True
    for function in (metrics.extraction_strength, metrics.exact_memorisation):
        assert 0 <= function([row]).value <= function([better]).value <= 1
    assert metrics.extraction_strength([row]).value <= metrics.exact_memorisation([row]).value


def test_an_unknown_compat_names_the_choices():
    with pytest.raises(UsageError, match="compat must be None or 'open-unlearning', got 'muse'"):
        metrics.extraction_strength([[True]], compat="muse")
