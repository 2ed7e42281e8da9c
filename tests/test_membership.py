"""Membership inference against closed forms, slow definitions and SciPy; and on real rows that a model has or has not
learnt."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from functools import cache
from inspect import signature

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from conftest import SHARED
from lorasure.config import ModelSettings
from lorasure.data.load import encode_rows
from lorasure.data.readers import read_rows
from lorasure.errors import DataError, NumericError, UsageError
from lorasure.evaluate import membership
from lorasure.evaluate.inside import gradient_norms
from lorasure.evaluate.membership import MEMBERSHIP, auc, membership_scores, privleak, tpr
from lorasure.evaluate.metrics import Score
from lorasure.forward import answer_records
from lorasure.models import load_model, load_tokenizer

FEW = settings(max_examples=30, deadline=None)  # each draws a whole bootstrap
VALUES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)
ROW = [-1.0, -4.0, -2.0, -8.0, -0.5]


# --- attacks


def test_attacks_by_hand() -> None:
    """Of five tokens Min-K takes the lowest two, -8 and -4; of one token, that one."""
    assert membership.loss([ROW, [-3.0]]).tolist() == [-3.1, -3.0]
    assert membership.min_k([ROW, [-3.0]]).tolist() == [-6.0, -3.0]
    assert membership.min_k([ROW], k=1).tolist() == membership.loss([ROW]).tolist()
    assert membership.min_k([ROW], k=0.01).tolist() == [-8.0]
    text = "an answer, an answer, an answer"
    assert membership.zlib_ratio([ROW], [text])[0] == pytest.approx(-3.1 / len(zlib.compress(text.encode())))
    assert membership.reference([ROW], [[-2.0] * 5]).tolist() == [pytest.approx(-1.1)]
    assert membership.gradient_norm([2.0, 0.5]).tolist() == [-2.0, -0.5]


def test_min_k_plus_plus_by_hand_and_with_its_floor() -> None:
    """(log p - mu) / sigma is -1, -2, 0, 3, -1; the lowest two average -1.5. A variance of 0 counts as 1e-6."""
    expected, variance = [-0.5, -2.0, -2.0, -9.5, -0.25], [0.25, 1.0, 4.0, 0.25, 0.0625]
    assert membership.min_k_plus_plus([ROW], [expected], [variance])[0] == pytest.approx(-1.5)
    certain = membership.min_k_plus_plus([[-2e-3]], [[-1e-3]], [[0.0]])[0]
    assert certain == pytest.approx(-1e-3 / math.sqrt(1e-6))
    with pytest.raises(DataError, match="record 0 has 5, 4 and 5 tokens"):
        membership.min_k_plus_plus([ROW], [expected[:4]], [variance])


def test_min_k_looks_at_the_surprising_tokens_and_the_loss_at_all() -> None:
    """The same mean, spread otherwise: only Min-K tells these apart."""
    even, uneven = [[-2.0] * 5], [[-5.0, -5.0, 0.0, 0.0, 0.0]]
    assert membership.loss(even) == membership.loss(uneven)
    assert membership.min_k(even) > membership.min_k(uneven)


@pytest.mark.parametrize("k", [0, -0.1, 1.1])
def test_a_share_of_tokens_out_of_range_is_refused(k: float) -> None:
    with pytest.raises(UsageError, match=f"k must be above 0 and at most 1, got {k}"):
        membership.min_k([ROW], k=k)


def test_columns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="texts has 2 examples, expected 1"):
        membership.zlib_ratio([ROW], ["a", "b"])
    with pytest.raises(DataError, match="reference_log_probs has 2 examples, expected 1"):
        membership.reference([ROW], [ROW, ROW])
    with pytest.raises(NumericError, match="record 1 holds nan"):
        membership.loss([ROW, [math.nan]])


# --- AUC and TPR


@FEW
@given(VALUES, VALUES)
def test_auc_is_the_share_of_pairs_in_order_with_ties_one_half(learnt: list[float], unseen: list[float]) -> None:
    """References: every pair counted, and SciPy's U statistic."""
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in learnt for b in unseen]
    score = auc(learnt, unseen)
    assert score.value == pytest.approx(np.mean(pairs), abs=1e-12)
    assert score.value == pytest.approx(mannwhitneyu(learnt, unseen).statistic / len(pairs), abs=1e-12)
    assert score.value == pytest.approx(1 - auc(unseen, learnt).value, abs=1e-12)
    assert (score.n, score.extra["n_unseen"]) == (len(learnt), len(unseen))


@FEW
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200), st.randoms())
def test_auc_of_identical_sets_is_exactly_one_half(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)
    assert auc(values, shuffled).value == 0.5


def test_auc_only_looks_at_ranks() -> None:
    learnt, unseen = np.random.default_rng(0).normal(0.5, 1, 30), np.random.default_rng(1).normal(0, 1, 40)
    assert auc(np.exp(learnt), np.exp(unseen)).value == auc(learnt, unseen).value


def test_the_interval_of_auc_agrees_with_theory_and_covers() -> None:
    """References: Hanley and McNeil's standard error for exponential scores; what 95 % means, on 100 data sets."""
    rng, n, true = np.random.default_rng(0), 60, 2 / 3  # P(Exp(mean 2) > Exp(mean 1)) = 2/3
    scores = [auc(rng.exponential(2, n), rng.exponential(1, n), seed=i) for i in range(100)]
    q1, q2 = true / (2 - true), 2 * true**2 / (1 + true)
    error = math.sqrt((true * (1 - true) + (n - 1) * (q1 - true**2) + (n - 1) * (q2 - true**2)) / n**2)
    width = np.mean([s.high - s.low for s in scores])
    assert width == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert 88 <= sum(s.low <= true <= s.high for s in scores) <= 99


def test_each_set_is_resampled_for_itself() -> None:
    """One unseen value above 99 learnt ones: it is left out of about a third of the draws, which then reach 1."""
    score = auc([1.0] * 99, [0.0, 2.0])
    assert set(np.round(score.draws, 3)) == {0.0, 0.5, 1.0}


def test_one_example_gives_no_interval_and_none_is_an_error() -> None:
    assert auc([1.0], [0.0, 0.5]).low is None and auc([1.0, 2.0], [0.0]).low is None
    with pytest.raises(DataError, match="unseen: no examples"):
        auc([1.0], [])
    with pytest.raises(NumericError, match="learnt: record 1 is nan"):
        tpr([1.0, math.nan], [1.0])


@FEW
@given(VALUES, st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=300))
def test_tpr_is_the_best_of_all_thresholds_that_accuse_one_percent(learnt: list[float], unseen: list[float]) -> None:
    """Reference: every threshold tried."""
    a, b = np.array(learnt), np.array(unseen)
    best = max(float((a > t).mean()) for t in [*a, *b, 99] if (b > t).mean() <= 0.01)
    assert tpr(learnt, unseen).value == best


def test_tpr_by_hand() -> None:
    """100 unseen values allow one false alarm, so the threshold is the second highest; 99 allow none."""
    unseen = np.arange(100.0)
    assert tpr([98.5, 97.5, 99.5, 98.0], unseen).value == 0.5
    assert tpr([98.5, 97.5, 99.5, 98.0], unseen[1:]).value == 0.25


# --- PrivLeak


def test_privleak_in_the_published_direction() -> None:
    """By hand, A = 1 - AUC: an AUC of 1 (all still known) against a fair 1/2 is -100, one of 3/8 is +25."""
    fair = auc([1.0, 2.0], [1.0, 2.0])
    assert privleak(auc([3.0, 4.0], [1.0, 2.0]), fair).value == pytest.approx(-100)
    assert privleak(auc([1.0, 0.0], [0.0, 2.0]), fair).value == pytest.approx(25)
    assert privleak(fair, fair).value == 0


def test_privleak_resamples_both_models_together() -> None:
    """A model against itself is 0 in every draw; against an independent one it is not."""
    rng = np.random.default_rng(0)
    ours, theirs = (auc(rng.normal(size=50), rng.normal(size=50)) for _ in range(2))
    itself = privleak(ours, ours)
    assert (itself.value, itself.low, itself.high) == (0, 0, 0)
    other = privleak(ours, theirs)
    assert other.low < other.value < other.high and other.extra["auc"] == ours.value


def test_privleak_is_undefined_rather_than_guessed() -> None:
    known, fair = auc([3.0, 4.0], [1.0, 2.0]), auc([1.0, 2.0], [1.0, 2.0])
    without = privleak(known, None)
    assert without.value is None and "no retrained reference" in str(without.reason)
    assert privleak(fair, known).value is None and "every row" in str(privleak(fair, known).reason)
    undefined = privleak(Score(None, 2, extra={"n_unseen": 2}, reason="not measured"), fair)
    assert undefined.value is None and undefined.reason == "not measured"
    with pytest.raises(DataError, match="must be the same rows"):
        privleak(auc([1.0], [1.0, 2.0]), fair)
    assert privleak(replace(known, draws=None), fair).low is None


# --- all attacks together


def attacked(columns: dict) -> dict:
    """Values of the attacks whose columns are there."""
    needs = {name: list(signature(attack.function).parameters.values()) for name, attack in MEMBERSHIP.items()}
    names = {name: [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD] for name, found in needs.items()}
    ready = {name: found for name, found in names.items() if columns.keys() >= set(found)}
    return {name: MEMBERSHIP[name].function(*(columns[c] for c in found)) for name, found in ready.items()}


def test_every_attack_is_scored_or_says_what_was_not_measured() -> None:
    values = attacked({"log_probs": [ROW, ROW], "texts": ["a", "b"]})
    scores = membership_scores(values, values)
    assert set(scores) == {f"{name}_{kind}" for name in MEMBERSHIP for kind in ("auc", "tpr")}
    assert scores["loss_auc"].value == scores["zlib_auc"].value == scores["min_k_auc"].value == 0.5
    assert scores["min_k_plus_plus_auc"].reason == "not measured"
    assert scores["reference_tpr"].value is None and "--gradient-norm" in str(scores["gradient_norm_auc"].reason)
    for attack in MEMBERSHIP.values():
        assert attack.title and attack.paper.startswith("https://arxiv.org/abs/") and attack.function.__doc__


@cache
def _columns(name: str, start: int, step: int, reference: str | None = None) -> dict:
    """20 rows of TOFU's `full`, `step` apart, as the mini model `name` sees them."""
    folder = str(SHARED / "models" / name)
    model, tokenizer = load_model(folder, dtype=torch.float32, device=torch.device("cpu")), load_tokenizer(folder)
    rows = read_rows(SHARED / "data" / "tofu" / "full.json").rows[start : start + 20 * step : step]
    examples = encode_rows(rows, ModelSettings(model=folder), tokenizer).examples
    records = answer_records(model, examples, 1024, moments=True)
    found = {c: [getattr(r, c) for r in records] for c in ("log_probs", "expected", "variance")}
    found |= {
        "texts": [row.answer for row in rows],
        "norms": gradient_norms(model, examples, list(model.model.layers[-1].parameters())),
    }
    return found | ({"reference_log_probs": _columns(reference, start, step)["log_probs"]} if reference else {})


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the small TOFU models are not at hand")
def test_attacks_find_what_the_small_target_has_learnt_and_nothing_else() -> None:
    """Rows 3800 on are learnt by the target and not by retain95; nobody has seen rows 1000 to 2999."""
    pairs = {
        "learnt": (_columns("tofu-mini-target", 3800, 9, "tofu-mini-retain95"), _columns("tofu-mini-target", 1000, 47)),
        "unseen": (_columns("tofu-mini-target", 1001, 47), _columns("tofu-mini-target", 1000, 47)),
        "retrained": (_columns("tofu-mini-retain95", 3800, 9), _columns("tofu-mini-retain95", 1000, 47)),
    }
    pairs["learnt"][1]["reference_log_probs"] = _columns("tofu-mini-retain95", 1000, 47)["log_probs"]
    found = {name: membership_scores(*map(attacked, sides)) for name, sides in pairs.items()}
    for attack in MEMBERSHIP:
        assert found["learnt"][f"{attack}_auc"].value > 0.99, attack
        if attack != "reference":
            fair = found["unseen"][f"{attack}_auc"]
            assert fair.low < 0.5 < fair.high and 0.35 < fair.value < 0.65, attack
            assert found["retrained"][f"{attack}_auc"].value < 0.65, attack
    leak = privleak(found["learnt"]["min_k_auc"], found["retrained"]["min_k_auc"])
    assert leak.value == pytest.approx(-100, abs=2)
