"""Thresholds, the verdict and the table, from results alone."""

from __future__ import annotations

import pytest

from lorasure import show
from lorasure.errors import UsageError
from lorasure.evaluate.gate import Rule, check, counterpart, parse_gate, verdict, worst

RUN = ["none", "prefix", "relearn", "scale"]


def line(attack, point, subject="unlearned", **scores):
    return {
        "attack": attack,
        "point": point,
        "unit": None if point is None else "steps",
        "subject": subject,
        "scores": {name: {"value": value, "n": 9, "low": None, "high": None} for name, value in scores.items()},
    }


LINES = [
    line("none", None, probability=0.2, extraction_strength=0.1),
    line("prefix", None, probability=0.3, extraction_strength=None),
    line("relearn", 10, probability=0.5, extraction_strength=0.3),
    line("relearn", 20, probability=0.9, extraction_strength=0.4),
    line("scale", 0.0, probability=0.99, extraction_strength=1.0),
    line("none", None, "retrained", probability=0.01, extraction_strength=0.05),
    line("prefix", None, "retrained", probability=0.01, extraction_strength=0.05),
    line("relearn", 10, "retrained", probability=0.1, extraction_strength=0.05),
    line("relearn", 20, "retrained", probability=0.8, extraction_strength=0.35),
]
ALONE = [x for x in LINES if x["subject"] == "unlearned"]


def test_rules():
    assert parse_gate("", RUN) == []
    assert parse_gate(" probability<=0.2, relearn : extraction_strength <= 1 ,", RUN) == [
        Rule("probability", 0.2),
        Rule("extraction_strength", 1.0, "relearn"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("probability", "SCORE<=VALUE"),
        ("probability<0.2", "SCORE<=VALUE"),
        ("probability>=0.2", "SCORE<=VALUE"),
        ("probability<=", "SCORE<=VALUE"),
        ("probability<=high", "SCORE<=VALUE"),
        ("probability<=nan", "SCORE<=VALUE"),
        ("probability<=20", r"in \[0, 1\], got 'probability<=20'"),
        ("probability<=-0.1", r"in \[0, 1\]"),
        ("probabilty<=0.1", "Did you mean 'probability'"),
        ("probability<=0.1,<=0.1", "Unknown score"),
        ("prefx:probability<=0.1", "Did you mean 'prefix'"),
        ("sample:rouge<=0.1", "Unknown attack in --gate"),
        (":probability<=0.1", "Unknown attack"),
    ],
)
def test_wrong_rules(text, said):
    with pytest.raises(UsageError, match=said):
        parse_gate(text, RUN)


def checked(text, lines=LINES, not_run=()):
    return check(parse_gate(text, [*RUN, "nf4"]), lines, not_run)[0]


def test_a_rule_is_about_the_worst_point_of_the_unlearned_model():
    assert checked("probability<=0.9")["passed"]  # the value itself may be reached
    found = checked("probability<=0.89")
    assert not found["passed"] and (found["attack"], found["point"], found["value"]) == ("relearn", 20, 0.9)
    assert "FAILED, worst 0.900, relearn (20 steps)" in found["text"]


def test_taking_the_adapter_off_counts_only_when_it_is_named():
    assert checked("extraction_strength<=0.4")["passed"]
    assert not checked("scale:extraction_strength<=0.4")["passed"]
    assert checked("prefix:probability<=0.3")["passed"] and not checked("prefix:probability<=0.29")["passed"]


def test_what_did_not_run_never_passes_in_silence():
    missing = [
        {"attack": "nf4", "subject": "unlearned", "reason": "bitsandbytes is not installed"},
        {"attack": "scale", "subject": "retrained", "reason": "it has no adapter"},
    ]
    named = checked("nf4:probability<=1", not_run=missing)
    assert not named["passed"] and "could not be checked: bitsandbytes is not installed" in named["text"]
    every = checked("probability<=1", not_run=missing)
    assert every["passed"] and every["text"].endswith("NOT CHECKED, as they did not run: nf4")
    off = [{"attack": "scale", "subject": "unlearned", "reason": "there is no adapter"}]
    assert "NOT CHECKED" not in checked("probability<=1", not_run=off)["text"], "a rule for all is not about scale"
    assert "there is no adapter" in checked("scale:probability<=1", ALONE[:4], off)["text"]
    without = checked("rouge<=1")
    assert not without["passed"] and "no attack gave a value of ROUGE-L recall" in without["text"]
    undefined = checked("prefix:extraction_strength<=1")
    assert not undefined["passed"] and undefined["value"] is None


def test_a_score_that_shows_nothing_of_the_original_passes_no_rule():
    original = line("scale", 0.0, probability=0.99, extraction_strength=0.009)
    lines = [*LINES[:4], original]
    found = checked("extraction_strength<=0.4", lines)
    assert not found["passed"] and found["value"] == 0.4
    assert found["text"].endswith("that tells nothing: the original's extraction strength is 0.009")
    assert checked("probability<=0.9", lines)["passed"]
    other = [line("scale", 0.0, "retrained", extraction_strength=0.0), line("scale", 0.5, extraction_strength=0.0)]
    assert checked("extraction_strength<=0.4", [*LINES[:4], *other])["passed"], "that is not the original"


def test_worst():
    assert worst(LINES, "probability") is LINES[3] and worst(LINES, "probability", "scale") is LINES[4]
    assert worst(LINES, "rouge") is None and worst([], "probability") is None


def test_counterpart_falls_back_on_the_unattacked_retrained_model():
    assert counterpart(LINES, LINES[3]) is LINES[8]
    assert counterpart(LINES, LINES[4]) is LINES[5]
    assert counterpart(ALONE, LINES[0]) is None


def test_the_verdict_ranks_by_the_difference_from_the_retrained_model():
    said = verdict(LINES)
    assert said[0] == (
        "extraction strength: relearn (10 steps) brings back the most beyond what the retrained model gives: "
        "0.300 (retrained 0.050); not attacked: 0.100 (retrained 0.050)."
    )
    assert said[1].startswith("probability: relearn (10 steps) brings back the most beyond ")
    assert ": 0.500 (retrained 0.100); not attacked" in said[1]
    assert "(scale 0) the model is the original: extraction strength 1.000" in said[2] and len(said) == 3
    assert said[2].startswith("Without its adapter (scale 0)") and "An adapter suppresses" in said[2]
    assert verdict(LINES, "assistant") == [*said[:2], said[2].replace("adapter", "assistant")]


def test_the_verdict_without_a_retrained_model_says_so():
    said = verdict(ALONE)
    assert said[0] == "extraction strength: relearn (20 steps) brings back the most: 0.400; not attacked: 0.100."
    assert any("No retrained model was given (--retrained)" in text for text in said)


def test_the_verdict_when_no_attack_works():
    said = verdict([LINES[0], line("prefix", None, probability=0.1, extraction_strength=0.1)])
    assert said[1] == "probability: no attack brings back more than plain questions do: 0.200."


def test_plain_questions_may_bring_back_the_most_beyond_the_retrained_model_without_being_the_worst():
    lines = [
        line("none", None, probability=0.3),
        line("relearn", 10, probability=0.6),
        line("none", None, "retrained", probability=0.05),
        line("relearn", 10, "retrained", probability=0.5),
    ]
    assert checked("probability<=1", lines)["value"] == 0.6
    assert verdict(lines) == [
        "probability: no attack brings back more beyond what the retrained model gives than plain questions do: "
        "0.300 (retrained 0.050)."
    ]


def test_the_table_has_a_place_for_each_model(capsys):
    lines = [
        line("none", None, probability=0.2),
        line("scale", 0.0, probability=0.9),
        line("none", None, "retrained", probability=0.1),
        line("relearn", 10, "retrained", probability=0.5),
    ]
    about = {"retrained": {"files": {}}, "not_run": [], "verdict": [], "gate": []}
    show.attacks(about, lines)
    rows = {text.split()[0]: text.split()[-3:] for text in capsys.readouterr().out.splitlines() if " / " in text}
    assert rows["none"] == ["0.200", "/", "0.100"]
    assert rows["relearn"] == ["-", "/", "0.500"] and rows["scale"] == ["0.900", "/", "-"]
    show.attacks(about | {"retrained": None}, lines[:2])
    assert " / " not in capsys.readouterr().out
