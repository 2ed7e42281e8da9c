"""What the attacks found, from their results alone: the worst, a verdict in words, thresholds for a pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..registry import lookup
from .metrics import HARDLY_KNOWN

# Names in results -> in sentences, the most trustworthy first (arXiv 2506.12618).
SCORES = {
    "extraction_strength": "extraction strength",
    "exact_memorisation": "exact memorisation",
    "probability": "probability",
    "rouge": "ROUGE-L recall",
}
UNDOES = "scale"  # not an attack on the forgetting: without the adapter anything is known again
Line = dict[str, Any]  # attack, point (counted in unit), subject, scores: name -> Score as JSON


@dataclass(frozen=True)
class Rule:
    """`score` of the unlearned model must not exceed `most` under `attack`; None: under any but `scale`."""

    score: str
    most: float
    attack: str | None = None

    def __str__(self) -> str:
        return f"{self.attack + ':' if self.attack else ''}{self.score}<={self.most:g}"


def parse_gate(text: str, attacks: Iterable[str]) -> list[Rule]:
    """The rules of --gate; `attacks` are those that will run. UsageError for anything else."""
    return [_rule(part.strip(), dict.fromkeys(attacks)) for part in text.split(",") if part.strip()]


def _rule(text: str, attacks: dict[str, None]) -> Rule:
    left, sign, right = text.partition("<=")
    attack, colon, score = left.strip().rpartition(":")
    try:
        most = float(right)
    except ValueError:
        most = math.nan
    if not sign or not 0 <= most <= 1:
        raise UsageError(f"--gate must be SCORE<=VALUE or ATTACK:SCORE<=VALUE with a value in [0, 1], got '{text}'.")
    lookup(SCORES, score.strip(), "score in --gate")
    if colon:
        lookup(attacks, attack.strip(), "attack in --gate (those of --attacks count)")
    return Rule(score.strip(), most, attack.strip() if colon else None)


def check(rules: Sequence[Rule], lines: Sequence[Line], not_run: Sequence[Line]) -> list[dict[str, Any]]:
    """For each rule: `rule`, `passed`, the `value`, `attack` and `point` of the worst, and `text`, all of it in words.

    A rule without any value to compare is not passed, nor is one on a score that shows hardly anything of the original,
    as far as that was measured (`scale` 0). What a rule could not see, because an attack that it is about did not run,
    is said in its text.
    """
    missing = {line["attack"]: line["reason"] for line in not_run if line["subject"] == "unlearned"}
    return [_checked(rule, lines, missing) for rule in rules]


def _checked(rule: Rule, lines: Sequence[Line], missing: dict[str, str]) -> dict[str, Any]:
    line = worst(lines, rule.score, rule.attack)
    found: dict[str, Any] = {"rule": str(rule), "passed": False, "value": None, "attack": rule.attack, "point": None}
    if line is None:
        why = missing.get(rule.attack or "", f"no attack gave a value of {SCORES[rule.score]}")
        return found | {"text": f"gate {rule}: FAILED, it could not be checked: {why}"}
    value, before = line["scores"][rule.score]["value"], value_of(_original(lines), rule.score)
    unknown = before is not None and before < HARDLY_KNOWN
    passed = value <= rule.most and not unknown
    found |= {"passed": passed, "value": value, "attack": line["attack"], "point": line["point"]}
    text = f"gate {rule}: {'passed' if passed else 'FAILED'}, worst {value:.3f}, {place(line)}"
    if unknown:
        text += f"; that tells nothing: the original's {SCORES[rule.score]} is {before:.3f}"
    unseen = [name for name in missing if name != UNDOES]
    if unseen and rule.attack is None:
        text += f"; NOT CHECKED, as they did not run: {', '.join(unseen)}"
    return found | {"text": text}


def worst(lines: Sequence[Line], score: str, attack: str | None = None) -> Line | None:
    """The result of the unlearned model with the highest value of a score; None if there is no value.

    Under one attack, or under all but `scale`, the unattacked model included.
    """
    return max(_candidates(lines, score, attack), key=lambda line: line["scores"][score]["value"], default=None)


def _candidates(lines: Sequence[Line], score: str, attack: str | None) -> list[Line]:
    return [
        line
        for line in lines
        if line["subject"] == "unlearned"
        and (line["attack"] != UNDOES if attack is None else line["attack"] == attack)
        and value_of(line, score) is not None
    ]


def _original(lines: Sequence[Line]) -> Line | None:
    """The result of the model without what the run added; None if that was not measured."""
    return next((x for x in lines if (x["attack"], x["point"], x["subject"]) == (UNDOES, 0, "unlearned")), None)


def value_of(line: Line | None, score: str) -> float | None:
    """The value of a score in a result, None where there is none."""
    return line["scores"].get(score, {}).get("value") if line else None


def counterpart(lines: Sequence[Line], line: Line) -> Line | None:
    """The retrained model under the same attack; else the unattacked one, None if there is no retrained model."""
    found = {(x["attack"], x["point"]): x for x in lines if x["subject"] == "retrained"}
    return found.get((line["attack"], line["point"]), found.get(("none", None)))


def place(line: Line) -> str:
    """Attack and point in words."""
    return line["attack"] if line["point"] is None else f"{line['attack']} ({line['point']:g} {line['unit']})"


def verdict(lines: Sequence[Line], change: str = "adapter") -> list[str]:
    """Sentences: for each score what brings back the most, beside the retrained model, and that adapters come off.

    `change`: what the run handed over, an adapter or an assistant.
    With a retrained model that is the attack with the largest difference from it, since what an attack gets out of a
    model that never saw the text was not remembered; without one, the attack with the highest value.
    """
    said = [text for score in SCORES if (text := _sentence(lines, score))]
    if not any(line["subject"] == "retrained" for line in lines):
        said.append(
            "No retrained model was given (--retrained), so what an attack gets out of any model is counted as well."
        )
    if without := _original(lines):
        score = next(iter(SCORES))
        said.append(
            f"Without its {change} (scale 0) the model is the original: {SCORES[score]} {value_of(without, score):.3f}."
            f" An {change} suppresses, it does not erase: whoever holds the base can leave it out."
        )
    return said


def _sentence(lines: Sequence[Line], score: str) -> str | None:
    candidates = _candidates(lines, score, None)
    if not candidates:
        return None

    def excess(line: Line) -> float:
        return line["scores"][score]["value"] - (value_of(counterpart(lines, line), score) or 0.0)

    most = max(candidates, key=excess)
    compared = any(value_of(counterpart(lines, line), score) is not None for line in candidates)
    beyond = " beyond what the retrained model gives" if compared else ""
    figures = _figures(lines, most, score)
    if most["attack"] == "none":
        return f"{SCORES[score]}: no attack brings back more{beyond} than plain questions do: {figures}."
    plain = next((line for line in candidates if line["attack"] == "none"), None)
    before = f"; not attacked: {_figures(lines, plain, score)}" if plain else ""
    return f"{SCORES[score]}: {place(most)} brings back the most{beyond}: {figures}{before}."


def _figures(lines: Sequence[Line], line: Line, score: str) -> str:
    other = value_of(counterpart(lines, line), score)
    return f"{value_of(line, score):.3f}" + ("" if other is None else f" (retrained {other:.3f})")
