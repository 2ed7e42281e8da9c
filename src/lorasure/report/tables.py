"""Scores side by side: one table, shown on a terminal, in Markdown, in LaTeX, as JSON, and in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError
from ..evaluate.evaluation import check_comparable
from ..evaluate.gate import SCORES
from ..evaluate.metrics import Score
from ..evaluate.table import METRICS
from .read import Run, Scores

SETS = {"": "All together", "forget": "Rows to forget", "retain": "Rows to keep", "holdout": "Rows that no model saw"}
NAMES = {name: metric.title for name, metric in METRICS.items()} | {
    "rouge": "ROUGE-L recall",
    "cka_original": "Linear CKA with the original",
    "model_utility_arithmetic": "Model utility (arithmetic truth ratio)",
    "model_utility_without_rouge": "Model utility without ROUGE",
}
# What to want of a score: more, less, or neither. On rows to forget a model should know less, elsewhere not.
MORE = ("forget_quality", "model_utility", "model_utility_arithmetic", "model_utility_without_rouge", "truth_ratio")
CHECK = "check"
NOTE = (
    "Bold: the best run. Intervals are 95 %, over examples; where two of them overlap, the difference may be chance. "
    "On rows to forget less is better only down to what the retrained model has."
)


@dataclass(frozen=True)
class Row:
    """One score: `set` and `name` in words, `key` as in scores.json, and its Score (or None) per column."""

    set: str
    name: str
    key: str
    cells: tuple[Score | None, ...]
    best: frozenset[int] = frozenset()

    @property
    def n(self) -> str:
        """Examples behind the scores."""
        return ", ".join(dict.fromkeys(str(score.n) for score in self.cells if score is not None))


@dataclass(frozen=True)
class Table:
    """Scores of several models on the same rows: those of a suite, or of a run's own check (CHECK)."""

    suite: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """For people."""
        return "The run's own check" if self.suite == CHECK else f"Suite {self.suite}"

    @property
    def groups(self) -> dict[str, list[Row]]:
        """Rows by data set, in their order."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.set, []).append(row)
        return found

    @property
    def notes(self) -> list[str]:
        """What there is to know about some of the scores: their names and the note that they carry."""
        found: dict[str, dict[str, None]] = {}
        for row in self.rows:
            for note in [str(s.extra["note"]) for s in row.cells if s is not None and "note" in s.extra]:
                found.setdefault(note, {})[row.name] = None
        return [f"{', '.join(names)}: {note}." for note, names in found.items()]


def score_table(suite: str, columns: Mapping[str, Scores], sets: Sequence[str], compared: Sequence[str] = ()) -> Table:
    """All scores: those of all sets together, then set by set, the most telling first.

    The best among the columns `compared` is marked. `sets`: data sets, whose names begin the names of their scores.
    """
    keys = dict.fromkeys(key for scores in columns.values() for key in scores)
    places = [i for i, column in enumerate(columns) if column in compared]
    split = {key: _split(key, sets) for key in keys}
    rows = []
    for key in sorted(keys, key=lambda key: _rank(*split[key])):
        (owner, part), cells = split[key], tuple(scores.get(key) for scores in columns.values())
        named = NAMES.get(part, part.replace("_", " ").capitalize())
        rows.append(Row(set_title(owner), named, key, cells, _best(owner, part, cells, places)))
    return Table(suite, tuple(columns), tuple(rows))


def _split(key: str, sets: Sequence[str]) -> tuple[str, str]:
    """The set ("" for all together) and the rest of a score's name."""
    owner = "" if key in NAMES else max((s for s in sets if key.startswith(f"{s}_")), key=len, default="")
    return owner, key.removeprefix(f"{owner}_") if owner else key


def _rank(owner: str, part: str) -> tuple[int, str, int]:
    first, known = list(SETS)[:-1], [*MORE, *SCORES]
    place = first.index(owner) if owner in first else len(first)
    return place, owner, known.index(part) if part in known else len(known)


def set_title(name: str) -> str:
    """A data set in words."""
    return SETS.get(name, name.replace("_", " ").capitalize())


def _best(owner: str, part: str, cells: Sequence[Score | None], places: Sequence[int]) -> frozenset[int]:
    forget = owner.endswith("forget")
    wanted = 1 if part in MORE or (part in SCORES and not forget) else -1 if part in SCORES else 0
    values = {i: wanted * s.value for i in places if (s := cells[i]) is not None and s.value is not None}
    if not wanted or len(values) < 2 or owner == "holdout":
        return frozenset()
    return frozenset(i for i, value in values.items() if value == max(values.values()))


def compare(runs: Sequence[Run]) -> list[Table]:
    """Runs side by side: their own check, then every suite that one of them was evaluated on.

    A base that all runs share is the first column, a retrained model the last. DataError where scores do not mean the
    same: other rows, number of rows, template or tokenizer.
    """
    names = run_names(runs)
    shared = all(run.summary["base"]["files"] == runs[0].summary["base"]["files"] for run in runs)
    tables = []
    checked = {name: run.checked("after") for name, run in zip(names, runs, strict=True)}
    if any(checked.values()):
        _check_same_data(runs)
        original = next((scores for run in runs if (scores := run.checked("before"))), {})
        before = {"before": original} if shared else {}
        tables.append(score_table(CHECK, before | checked, ("forget", "retain"), names))
    for suite in dict.fromkeys(s.name for run in runs for s in run.suites):
        measured = {
            (name, role): m
            for name, run in zip(names, runs, strict=True)
            for s in run.suites
            if s.name == suite
            for role, m in s.models.items()
        }
        first, *rest = (m.evaluation for m in measured.values())
        for other in rest:
            check_comparable(first, other)
        columns = {name: measured[name, "after"].scores for name in names if (name, "after") in measured}
        outer = {role: m.scores for (_, role), m in reversed(measured.items()) if role != "after"}
        before = {"before": outer["before"]} if "before" in outer and shared else {}
        retrained = {"retrained": outer["retrained"]} if "retrained" in outer else {}
        tables.append(score_table(suite, before | columns | retrained, list(first.sets), names))
    if not tables:
        raise DataError(f"{runs[0].folder}: nothing was measured yet; finish the run or evaluate it first.")
    return tables


def run_names(runs: Sequence[Run]) -> list[str]:
    """Names of folders; their paths where two are the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _check_same_data(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for name in ("forget", "retain"):
            for key, what in (("sha256", "rows"), ("template", "template")):
                if first.data and run.data and run.data[name][key] != first.data[name][key]:
                    raise DataError(f"{first.folder} and {run.folder} cannot be compared: their {name} {what} differ.")
        counts = [[part["n"] for part in r.summary.get("after", {}).values()] for r in (first, run)]
        if all(counts) and counts[0] != counts[1]:
            scored = f"they scored {counts[0]} and {counts[1]} rows"
            raise DataError(f"{first.folder} and {run.folder} cannot be compared: {scored}.")


def shown(score: Score | None, digits: int = 3) -> str:
    """value [low, high]; "undefined" or "not measured" where there is none."""
    if score is None:
        return "not measured"
    if score.value is None:
        return "undefined"
    interval = "" if score.low is None else f" [{score.low:.{digits}f}, {score.high:.{digits}f}]"
    return f"{score.value:.{digits}f}{interval}"
