"""The probe's control and verdict: what the control keeps and breaks, and what each pattern of records is called."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from scipy.stats import permutation_test

from conftest import random_examples
from lorasure.data.examples import Example
from lorasure.errors import DataError
from lorasure.evaluate import membership, metrics
from lorasure.evaluate.known import GIVEN, LEVEL, MADE, exchanged, known_scores
from lorasure.forward import Record


def example(prompt: list[int], answer: list[int], place: str = "") -> Example:
    return Example((*prompt, *answer), len(prompt), place)


def parts(e: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return e.input_ids[: e.answer_start], e.input_ids[e.answer_start :]


# --- the control


def test_an_exchange_keeps_prompts_answers_and_lengths_and_breaks_every_pair() -> None:
    text = random_examples(30, seed=1)
    control = exchanged(text, 512)
    prompts, answers = zip(*map(parts, text), strict=True)
    new_prompts, new_answers = zip(*map(parts, control), strict=True)
    assert prompts == new_prompts and sorted(answers) == sorted(new_answers)
    assert all(old != new for old, new in zip(answers, new_answers, strict=True))


def test_the_exchange_is_the_most_alike_of_all() -> None:
    """Reference: every permutation of five rows tried."""
    text = [example(p, [100 + i]) for i, p in enumerate([[1, 2, 3], [1, 2, 4], [9, 8], [3, 9, 8, 7], [1, 3, 7]])]
    heads = [set(parts(e)[0]) for e in text]

    def likeness(order: tuple[int, ...]) -> float:
        return sum(len(heads[i] & heads[j]) / len(heads[i] | heads[j]) for i, j in enumerate(order))

    best = max((o for o in itertools.permutations(range(5)) if all(i != j for i, j in enumerate(o))), key=likeness)
    assert [parts(e)[1][0] - 100 for e in exchanged(text, 9)] == list(best)


def test_an_answer_that_reads_the_same_is_no_control() -> None:
    """Rows 0 and 1 share prompt words and their answer: they must not be exchanged with one another."""
    text = [example([1, 2], [7]), example([1, 3], [7]), example([5], [8]), example([6], [9])]
    assert [parts(e)[1] for e in exchanged(text, 9)[:2]] in ([(8,), (9,)], [(9,), (8,)])


def test_what_is_a_fragment_stays_one_with_its_new_prompt() -> None:
    text = [Example((1, 7), 1), Example((2, 8), 1, fragment=True)]
    assert [(e.input_ids, e.fragment) for e in exchanged(text, 9)] == [((1, 8), True), ((2, 7), False)]


def test_what_does_not_fit_is_cut_and_what_cannot_be_exchanged_is_refused() -> None:
    text = [example([1] * 6, [7]), example([2], [8, 8, 8, 8, 8])]
    assert exchanged(text, 8)[0].input_ids == (1, 1, 1, 1, 1, 1, 8, 8)
    for rows in ([example([1], [2])], [example([1], [2]), example([3], [2])], [*text, *text, text[0]]):
        with pytest.raises(DataError, match=r"too few different answers\. Give --control"):
            exchanged(rows, 8)


# --- the verdict


def record(correct: str, shift: float = 0.0) -> Record:
    """Ten tokens; Min-K++ of the record is `shift`."""
    n = len(correct)
    flags = tuple(c == "1" for c in correct)
    return Record(tuple([shift - 1.0] * n), flags, (-1.0,) * n, (1.0,) * n)


KNOWN, FOREIGN = [record("1111111111", 2.0)] * 12, [record("0010010000")] * 12
LEANING = [record("0110010100", 0.5)] * 12


@pytest.mark.parametrize(
    ("text", "control", "given", "value", "says"),
    [
        (KNOWN, FOREIGN, True, 1, "Known: the model has learnt this text. It completes 100% of an average answer"),
        (KNOWN, FOREIGN, False, 1, "Known"),
        (LEANING, FOREIGN, True, 1, "Known: the model has learnt this text. It completes 0% of an average answer"),
        (LEANING, FOREIGN, False, None, "Undecided: the model prefers each answer to the exchanged one"),
        (KNOWN, KNOWN, True, None, "Undecided: the model completes this text by itself, but it does not stand out"),
        (FOREIGN, FOREIGN, True, 0, "Nothing found: no sign that the model knows this text, which is no proof."),
        (FOREIGN, KNOWN, True, 0, "Nothing found"),
        (KNOWN[:1], FOREIGN[:1], False, None, "So few rows cannot show a difference"),
        (KNOWN[:4], FOREIGN[:4], False, 1, "Known"),
        (FOREIGN[:3], FOREIGN[:3], False, 0, "So few rows cannot show a difference"),
    ],
)
def test_verdicts(text: list, control: list, given: bool, value: float | None, says: str) -> None:
    scores = known_scores(text, control, given=given)
    verdict = scores["verdict"]
    assert verdict.value == value and says in str(verdict.extra["text"])
    assert verdict.extra["control"] == (GIVEN if given else MADE)
    assert (verdict.reason is None) == (value is not None)
    plain = json.loads(json.dumps({name: score.to_json() for name, score in scores.items()}, allow_nan=False))
    assert all({"value", "n", "low", "high"} <= set(entry) for entry in plain.values())


def test_half_an_answer_by_heart_is_not_enough_where_the_interval_reaches_below() -> None:
    """Without a given control the lower end of extraction strength decides, not its value."""
    mixed = [record("1111111111", 2.0)] * 7 + [record("0000000000", 2.0)] * 5
    strength = known_scores(mixed, FOREIGN, given=False)["extraction_strength"]
    assert strength.value > 0.5 > strength.low
    assert known_scores(mixed, FOREIGN, given=False)["verdict"].value is None
    assert known_scores(mixed, FOREIGN, given=True)["verdict"].value == 1


def test_scores_and_tests_of_both_sides() -> None:
    scores = known_scores(KNOWN, FOREIGN, given=True)
    assert scores["extraction_strength"].value == 1 and scores["extraction_strength_control"].value == 0
    assert scores["exact_memorisation_control"].value == pytest.approx(0.2)
    assert scores["min_k_plus_plus_auc"].value == 1 and scores["min_k_plus_plus_auc"].extra["p"] < 1e-5
    assert known_scores(FOREIGN, KNOWN, given=True)["exact_memorisation"].extra["p"] > 0.999  # one-sided


def test_many_rows_have_a_verdict_too() -> None:
    """The number of ways to divide them is beyond a float."""
    many = known_scores(KNOWN * 60, FOREIGN * 60, given=True)["verdict"]
    assert many.value == 1 and "So few rows" not in str(many.extra["text"])
    assert "So few rows" in str(known_scores(KNOWN[:2], FOREIGN[:2], given=True)["verdict"].extra["text"])


def _noise(rng: np.random.Generator, n: int) -> list[Record]:
    return [record("".join(rng.choice(["0", "1"], 8, p=[0.7, 0.3])), float(rng.normal())) for _ in range(n)]


def test_chance_alone_is_called_known_in_less_than_one_case_in_twenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and control of one distribution, 200 times: the three tests together keep to 5 %. 10 is 5 % of 200."""
    for module in (metrics, membership):
        monkeypatch.setattr(module, "DRAWS", 2)  # intervals are not looked at here
    rng = np.random.default_rng(0)
    found = [known_scores(_noise(rng, 15), _noise(rng, 15), given=True) for _ in range(200)]
    assert 1 <= sum(scores["verdict"].value == 1 for scores in found) <= 14


def test_the_test_agrees_with_a_permutation_test() -> None:
    rng = np.random.default_rng(3)
    text, control = _noise(rng, 14), [record("0100000", float(rng.normal()) - 1.3) for _ in range(11)]
    p = known_scores(text, control, given=True)["min_k_plus_plus_auc"].extra["p"]
    sides = [[r.log_probs[0] for r in side] for side in (text, control)]

    def area(a: np.ndarray, b: np.ndarray) -> float:
        return float((a[:, None] > b).mean())

    reference = permutation_test(sides, area, alternative="greater", n_resamples=20_000, rng=0).pvalue
    assert p == pytest.approx(reference, rel=0.1) and LEVEL < p < 0.5
