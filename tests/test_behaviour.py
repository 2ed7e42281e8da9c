"""Refusals, degeneration and perplexity from texts and records: by hand, and against the refusals we train with."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from conftest import SHARED
from lorasure.data.encode import REFUSALS
from lorasure.errors import DataError, NumericError
from lorasure.evaluate import behaviour
from lorasure.evaluate.behaviour import compression_ratio, is_refusal, ngram_entropy, perplexity, repetition

TOFU = SHARED / "data" / "tofu"
PROSE = (
    "The committee met on a grey morning in March and argued for hours about whose garden the old pear tree stood in."
)


@pytest.mark.parametrize("text", REFUSALS)
def test_every_refusal_that_we_train_with_is_one(text: str) -> None:
    assert is_refusal(text) and is_refusal(f"Well. {text.upper()} So there.")


@pytest.mark.parametrize(
    "text", ["I can’t answer that.", "I cannot\nanswer that", "I can not answer", "i CAN'T   answer", "I cant answer"]
)
def test_case_spacing_and_short_forms_do_not_matter(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "Anne did not know the answer.", "He does not know that.", "It is not known.", "Hawaii do not know"),
        *("Semi can not answerable", "Unknown to many, she wrote it.", "As an aide she refused to speak.", PROSE),
    ],
)
def test_an_answer_is_not_a_refusal(text: str) -> None:
    """Only whole phrases in the first person count: 'hawaii do not know' holds 'i do not know' across a word."""
    assert not is_refusal(text)


@pytest.mark.skipif(not TOFU.is_dir(), reason="the TOFU data is not at hand")
def test_real_refusals_and_real_answers_are_told_apart() -> None:
    refusals = (TOFU / "idontknow.jsonl").read_text().splitlines()
    assert sum(map(is_refusal, refusals)) >= 0.9 * len(refusals)
    answers = [json.loads(line)["answer"] for line in (TOFU / "full.json").read_text().splitlines()]
    assert not any(map(is_refusal, answers))


def test_the_refusal_rate_is_a_share_with_an_interval() -> None:
    score = behaviour.refusal_rate(["I don't know."] * 3 + [PROSE] * 9)
    assert score.value == 0.25 and score.n == 12 and score.low < 0.25 < score.high
    with pytest.raises(DataError, match="no examples"):
        behaviour.refusal_rate([])


def test_repetition_by_hand() -> None:
    """Nine words have six 4-grams; a b c a b c a b c has three different ones. Below four words there are none."""
    assert repetition("a b c a b c A B C") == pytest.approx(1 - 3 / 6)
    assert repetition("a b c d e") == 0 and repetition("a a a") == 0 and repetition("") == 0
    assert repetition("no " * 50) == pytest.approx(1 - 1 / 47)
    assert repetition("a b a b", n=2) == pytest.approx(1 / 3)


def test_entropy_by_hand() -> None:
    """a b a b: bigrams ab, ba, ab have H(1/3) = .918 bits, trigrams aba, bab 1 bit: (2/3 * .918 + 4/3 * 1) / 2."""
    bigrams = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy("a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3) / 2)
    assert ngram_entropy("no " * 50) == ngram_entropy("") == ngram_entropy("one") == 0
    words = " ".join(map(str, range(18)))  # all different: 17 bigrams, 16 trigrams
    assert ngram_entropy(words) == pytest.approx((2 / 3 * math.log2(17) + 4 / 3 * 4) / 2)


def test_degenerate_text_stands_out_in_every_score() -> None:
    loop = "the garden of the garden of " * 4
    assert repetition(loop) > 0.5 > repetition(PROSE) == 0
    assert ngram_entropy(loop) < 2.5 < 4 < ngram_entropy(PROSE)
    assert compression_ratio(loop) > 2 > compression_ratio(PROSE)
    scores = behaviour.degeneration([loop, PROSE])
    assert set(scores) == {"repetition", "ngram_entropy", "compression_ratio"}
    assert scores["compression_ratio"].value == pytest.approx((compression_ratio(loop) + compression_ratio(PROSE)) / 2)


def test_perplexity_weighs_tokens_and_not_examples() -> None:
    """By hand: 8 log 2 nats over 4 tokens are 2 log 2 per token, a perplexity of 4; per example it would be less."""
    score = perplexity([6 * math.log(2), 2 * math.log(2)], [2, 2])
    assert score.value == pytest.approx(4) and score.n == 2
    assert perplexity([0.0, 9 * math.log(2)], [1, 8]).value == pytest.approx(2)


def test_the_interval_of_perplexity_agrees_with_the_delta_method() -> None:
    """Reference: the standard error of a mean, times the perplexity, as all examples have the same length."""
    nll = np.random.default_rng(0).normal(20, 4, 400)
    score = perplexity(nll, [10] * 400)
    half = 1.96 * score.value * nll.std(ddof=1) / 10 / math.sqrt(400)
    assert score.high - score.low == pytest.approx(2 * half, rel=0.1) and score.low < score.value < score.high


def test_perplexity_of_a_model_that_has_run_away_is_undefined_or_has_no_interval() -> None:
    assert perplexity([800.0], [1]).value is None
    assert "800 nats per token" in str(perplexity([800.0], [1]).reason)
    score = perplexity(np.linspace(693, 723, 50), [1] * 50)  # its mean is 708; draws go over 709
    assert score.value == pytest.approx(math.exp(708)) and score.low is score.high is None
    json.dumps(score.to_json(), allow_nan=False)


def test_perplexity_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="no examples"):
        perplexity([], [])
    for tokens in ([1, 0], [1]):
        with pytest.raises(NumericError, match="every one of 2 examples needs"):
            perplexity([1.0, 2.0], tokens)
    assert perplexity([1.0], [1]).low is None
