"""How trials are measured: the scores that select, of the model with a trial's adapter and of the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import artifacts, evaluating
from ..data.examples import Row
from ..data.pairing import sample
from ..data.rows import brought_wrong, wrong_answers
from ..errors import UsageError
from ..evaluate.collect import EvaluationSet, Subject, collect
from ..evaluate.evaluation import Evaluation
from ..evaluate.metrics import Score
from ..evaluate.suites import SUITES
from ..evaluate.tofu import memorisation, set_scores
from ..lock import queued
from ..progress import Reporter
from ..workbench import Workbench
from .choose import MEASURED, NO_LEVEL, NO_PREFERENCE, PREFERENCE, Values
from .spec import Spec

ORIGINAL = "original.json"
WATCHED_ROWS = 16  # of each set, measured after every epoch; the share is of the same rows, so few say enough


class Measure:
    """The rows of the evaluation that a spec asks for, and a model's scores on them; no text is generated."""

    def __init__(self, folder: Path, spec: Spec, bench: Workbench) -> None:
        self.folder, self.settings, self.bench = folder, spec.evaluation, bench
        self.suite = SUITES[self.settings.suite]
        self.sets = self.suite.sets(self.settings)

    @property
    def watched(self) -> list[EvaluationSet]:
        """A few rows of every set."""
        return [replace(s, rows=tuple(s.rows[i] for i in _some(len(s.rows)))) for s in self.sets]

    def scores(self, model: Any, sets: Sequence[EvaluationSet]) -> dict[str, dict[str, Any]]:
        """The scores in MEASURED, as JSON."""
        records = evaluating.measure(self._subject(model), self.suite, sets, self.settings, Reporter(quiet=True))
        found = self.suite.score(Evaluation("trial", self.about, records), None)
        wanted = MEASURED | ({PREFERENCE: f"forget_{PREFERENCE}"} if self._offered else {})
        return {name: _defined(found, theirs).to_json() for name, theirs in wanted.items()}

    def utility(self, model: Any) -> float:
        """That of the watched rows alone."""
        return self.scores(model, self.watched)["utility"]["value"]

    def values(self, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        """The scores' values, and under `share` the utility as a share of the original's."""
        values = {name: score["value"] for name, score in scores.items()}
        return values | {"share": values["utility"] / self.original["all"]["utility"]["value"]}

    @cached_property
    def original(self) -> dict[str, Any]:
        """The model as it is: its scores under `all`, its `watched` utility, and the `level` that `known` goes down to.

        Measured by whoever comes first, before there is an adapter.
        """
        path = self.folder / ORIGINAL
        with queued(path):
            if not path.is_file():
                model = self.bench.model
                found = {"all": self.scores(model, self.sets), "watched": self.utility(model), "level": self._level()}
                if not (found["all"]["utility"]["value"] and found["watched"]):
                    raise UsageError(f"--model {self.bench.settings.model}: its utility is 0, so none can be kept.")
                artifacts.write_json(path, found)
        return artifacts.read_json(path)

    def _level(self) -> Values:
        """Extraction strength and probability of the forget set with wrong answers, where its rows bring them.

        Answers borrowed from other rows will not do: the model may know those by heart.
        """
        if not self._offered:
            return NO_LEVEL
        wrong = EvaluationSet("forget", wrong_answers(self._offered))
        records = collect(self._subject(self.bench.model), wrong)
        found = Evaluation("wrong answers", self.about, {"forget": records})
        strength = _defined(memorisation(found, "forget"), "extraction_strength").value
        probability = _defined(set_scores(found, "forget"), "probability").value
        known = {"extraction_strength": strength or 0.0, "forget_probability": probability or 0.0}
        return known | {PREFERENCE: NO_PREFERENCE}

    @cached_property
    def _offered(self) -> list[Row]:
        """The forget rows, if all of them bring wrong answers of their own; of running text none are measured."""
        [forget] = [s for s in self.sets if s.name == "forget"]
        offered = [r for r in forget.rows if r.kind != "text" and brought_wrong(r) and "borrowed" not in r.extra]
        return offered if len(offered) == len(forget.rows) else []

    def to_be(self) -> Evaluation:
        """The evaluation that every trial will be, without what is measured."""
        return evaluating.expected(self._subject(self.bench.model), self.about, self.sets)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What is measured: rows, tokenizer, template; see `evaluating.describe`."""
        return evaluating.describe(self._subject(self.bench.model), self.settings, self.sets)

    def _subject(self, model: Any) -> Subject:
        bench = self.bench
        return Subject(model, bench.tokenizer, self.settings, bench.token_budget, base=bench.fingerprint)


def _some(count: int) -> list[int]:
    return sample(count, min(count, WATCHED_ROWS), 0)


def _defined(scores: Mapping[str, Score], name: str) -> Score:
    if scores[name].value is None:
        raise UsageError(f"evaluation: {name} cannot be measured: {scores[name].reason}.")
    return scores[name]
