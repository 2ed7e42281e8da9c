"""A run's four promises in plain words, each with the figures behind it. What was not measured is "not shown"."""

from __future__ import annotations

from dataclasses import dataclass

from ..artifacts import MERGED
from ..evaluate.gate import SCORES, UNDOES
from ..evaluate.metrics import HARDLY_KNOWN, STILL_KNOWN, UTILITY_FLOOR, Score
from ..outcome import ASSISTANT, weights_of
from .read import Point, Run, Scores
from .tables import NAMES, shown

SIGNIFICANT = 0.05  # p below which two distributions of truth ratios count as different
KNOWLEDGE = tuple(SCORES)  # of the forget set, the most trustworthy first
UTILITY = ("model_utility", "model_utility_without_rouge", "retain_probability")


@dataclass(frozen=True)
class Promise:
    """`tone`: good, partly, bad or none, for the eye; `answer` says the same in words."""

    question: str
    answer: str
    tone: str
    text: str
    figures: tuple[tuple[str, str], ...] = ()


def promises(run: Run) -> list[Promise]:
    """Forgotten? Kept? Robust? Removable?"""
    return [_forgotten(run), _kept(run), _robust(run), _removable(run)]


Columns = dict[str, Scores]


def _columns(run: Run) -> list[Columns]:
    """Role -> scores: of every suite, best known first, and of the run's own check."""
    suites = [{role: m.scores for role, m in suite.models.items()} for suite in run.suites]
    return [*suites, {when: run.checked(when) for when in ("before", "after")}]


def _measured(run: Run, names: tuple[str, ...], roles: tuple[str, ...]) -> list[tuple[str, Scores]]:
    """Each of `names` that is defined for all `roles`, and its score per role: measurement by measurement, in order."""
    found = []
    for columns in _columns(run):
        for name in names:
            own = {role: s for role, scores in columns.items() if (s := scores.get(name)) and s.value is not None}
            found += [(name, own)] if own.keys() >= set(roles) else []
    return found


def _figures(name: str, scores: dict[str, Score]) -> tuple[tuple[str, str], ...]:
    label = NAMES.get(name.removeprefix("forget_").removeprefix("retain_"), name)
    return tuple((f"{label}, {role}", f"{shown(score)} (n = {score.n})") for role, score in scores.items())


def _value(score: Score) -> float:
    assert score.value is not None
    return score.value


def _least(score: Score) -> float:
    return _value(score) if score.low is None else score.low


def _most(score: Score) -> float:
    return _value(score) if score.high is None else score.high


def _forgotten(run: Run) -> Promise:
    question = "Forgotten?"
    names = tuple(f"forget_{name}" for name in KNOWLEDGE)
    found = _measured(run, names, ("before", "after"))
    if not found:
        return _not_shown(question, "The forget set was not measured before and after.")
    known = [(name, scores) for name, scores in found if _value(scores["before"]) >= HARDLY_KNOWN]
    if not known:
        return _not_shown(question, "The model hardly knew it before.", _figures(*found[0]))
    name, scores = known[0]
    if _value(scores["after"]) > STILL_KNOWN * _value(scores["before"]):
        text = "More than half of what the model knew of it is still there."
        return Promise(question, "No", "bad", text, _figures(name, scores))
    # Where only the run's own check knows the model before, a suite may still know what the retrained one has.
    compared = known[:1] if "retrained" in scores else _measured(run, (name, *names), ("after", "retrained"))[:1]
    figures = tuple(dict.fromkeys(line for pair in (known[0], *compared) for line in _figures(*pair)))
    quality = next((q.extra for s in run.suites if (q := s.score("after", "forget_quality"))), {})
    p = quality.get("p")
    if isinstance(p, float):
        figures += (("Same truth ratios as retrained: p", f"{p:.3g} (D = {quality['statistic']:.3f})"),)
    if any(_value(pair["after"]) > _most(pair["retrained"]) for _, pair in compared):
        return Promise(question, "In part", "partly", "More is left than in a model that never saw it.", figures)
    left = "No more is left than in a model that never saw it" if compared else "Less than half of it is left"
    if isinstance(p, float) and p < SIGNIFICANT:
        text = f"{left}, but its truth ratios tell it from a retrained model."
        return Promise(question, "In part", "partly", text, figures)
    if not compared:
        text = f"{left}. How far it should fall is unknown without this score of a retrained model."
        return Promise(question, "By this measure", "good", text, figures)
    return Promise(question, "Yes", "good", "No more is left than in a model that never saw it.", figures)


def _kept(run: Run) -> Promise:
    question = "The rest kept?"
    found = _measured(run, UTILITY, ("before", "after"))
    if not found:
        return _not_shown(question, "Nothing to keep was measured before and after.")
    name, scores = found[0]
    if not _value(scores["before"]):
        return _not_shown(question, "By this measure there was nothing to keep.", _figures(name, scores))
    share = _value(scores["after"]) / _value(scores["before"])
    figures = (("Share that is left", f"{share:.1%}"), *_figures(name, scores))
    if share < UTILITY_FLOOR:
        tone = "bad" if share < STILL_KNOWN else "partly"
        return Promise(question, "Not all of it", tone, "The rest suffered.", figures)
    text = "Measured on rows like those of training; it does not show that everything else is unharmed."
    return Promise(question, "Yes", "good", text, figures)


def _robust(run: Run) -> Promise:
    """From all attacks but that of taking the adapter out, which is the next promise."""
    question = "Robust?"
    attacked = [p for p in run.points if p.attack not in (UNDOES, "none") and p.subject == "unlearned"]
    measured = [m for m in KNOWLEDGE if any(_defined(p, m) for p in attacked)]
    if not measured:
        return _not_shown(question, "No attack was run; further training or other prompts may bring it back.")
    originals = {metric: _original(run, metric) for metric in measured}
    known = [m for m, original in originals.items() if original is None or _value(original) >= HARDLY_KNOWN]
    if not known:
        return _not_shown(question, "The model hardly knew it before.")
    metric, before = known[0], originals[known[0]]
    retrained = {place(p): p.scores[metric] for p in run.points if p.subject == "retrained" and _defined(p, metric)}
    pairs = [(p, retrained.get(place(p))) for p in attacked if _defined(p, metric)]
    point, reference = max(pairs, key=lambda pair: _value(pair[0].scores[metric]) - (_value(pair[1]) if pair[1] else 0))
    score = point.scores[metric]
    figures = ((f"{NAMES[metric]}, worst: {place(point)}", f"{shown(score)} (n = {score.n})"),)
    if reference:
        figures += (("The same attack on the retrained model", f"{shown(reference)} (n = {reference.n})"),)
    own = (p for p in run.points if (p.attack, p.subject) == ("none", "unlearned") and _defined(p, metric))
    plain = next((p.scores[metric] for p in own), None)
    figures += _figures(metric, {what: s for what, s in (("before", before), ("not attacked", plain)) if s})
    if all(r and _least(p.scores[metric]) <= _most(r) for p, r in pairs):
        text = "No attack that was run brings back more, beyond chance, than in a model that never saw the forget set."
        return Promise(question, "Against these attacks", "good", text, figures)
    if before and _value(score) > (half := STILL_KNOWN * _value(before)):
        there = "More than half of it is still there without an attack."
        text = there if plain and _value(plain) > half else "An attack brings more than half of it back."
        return Promise(question, "No", "bad", text, figures)
    text = "There is no retrained model to compare it with."
    if reference:
        there = "Some of it is still there without an attack."
        text = there if plain and _value(plain) >= _value(score) else "An attack brings some of it back."
    return Promise(question, "In part", "partly", text, figures)


def _original(run: Run, metric: str) -> Score | None:
    """A score of the model before the run: that of its evaluation, else of the attack that takes the adapter out."""
    found = [c["before"].get(f"forget_{metric}") for c in _columns(run) if "before" in c]
    taken_out = [p for p in run.points if (p.attack, p.point, p.subject) == (UNDOES, 0, "unlearned")]
    found += [p.scores.get(metric) for p in taken_out]
    return next((score for score in found if score and score.value is not None), None)


def place(point: Point) -> str:
    """Attack and point in words."""
    if point.attack == "none":
        return "not attacked"
    return point.attack if point.point is None else f"{point.attack} {point.point:g}"


def _defined(point: Point, metric: str) -> bool:
    return metric in point.scores and point.scores[metric].value is not None


def _removable(run: Run) -> Promise:
    question = "Removable?"
    weights = weights_of(run.files)
    if weights is None:
        return _not_shown(question, "The run hands nothing over yet.")
    kind = weights.split("/")[0]
    if kind == MERGED:
        text = "The weights themselves were changed: there is no adapter to leave out."
        return Promise(question, "No", "good", text)
    scaled = [p for p in run.points if p.attack == UNDOES and p.subject == "unlearned"]
    metric = next((m for m in KNOWLEDGE if scaled and all(_defined(p, m) for p in scaled)), "")
    figures = tuple((f"{NAMES[metric]}, {kind} x {p.point:g}", shown(p.scores[metric])) for p in scaled if metric)
    text = f"An {kind} suppresses, it does not erase: whoever holds the base can leave it out or scale it down."
    if kind == ASSISTANT:
        return Promise(question, "Yes", "partly", f"{text} It cannot be merged into the weights.", figures)
    if any(name.startswith(f"{MERGED}/") for name in run.files):
        text += " Merged weights were written too; in those there is nothing to leave out."
        return Promise(question, "The adapter, yes", "partly", text, figures)
    return Promise(question, "Yes", "partly", f"{text} Give away merged weights only.", figures)


def _not_shown(question: str, text: str, figures: tuple[tuple[str, str], ...] = ()) -> Promise:
    return Promise(question, "Not shown", "none", text, figures)
