"""What a report says about a run: plain lists and tables for the template, charts, and what was not shown."""

from __future__ import annotations

from dataclasses import dataclass

from ..evaluate.evaluation import SCORES
from ..outcome import adapter_form, learning_rate
from . import charts
from .questions import Questions, questions
from .read import ROLES, Run, Suite, truth_ratios
from .style import Chart, number
from .tables import CHECK, SETS, Table, score_table
from .verdict import KNOWLEDGE, UTILITY, Promise, promises

Pairs = list[tuple[str, str]]
UNMEASURED = {
    "before": "the model before forgetting (lorasure evaluate --model BASE)",
    "after": "the model after forgetting (lorasure evaluate --model BASE --adapter RUN)",
    "retrained": "a model trained without the forget set; without it, what forgetting should look like is unknown "
    "(lorasure evaluate --model RETRAINED)",
}
ALWAYS_OPEN = (
    "That nothing else was harmed: the rows to keep are samples, and training may have used them.",
    "That the knowledge cannot come back by other means than those listed here, such as other prompts, other languages "
    "or training on other text.",
)


@dataclass(frozen=True)
class Measurement:
    """The scores of one suite (or of the run's own check) with their charts, and the single examples."""

    table: Table
    charts: list[Chart]
    questions: Questions | None = None


@dataclass(frozen=True)
class Contents:
    """Everything a report says about one run."""

    name: str
    promises: list[Promise]
    asked: Pairs
    done: Pairs
    measurements: list[Measurement]
    training: Chart | None
    importance: Chart | None
    attacks: list[Chart]
    attack_words: list[str]
    attack_titles: Pairs
    not_shown: list[str]
    settings: Pairs
    hashes: Pairs
    versions: Pairs
    cost: Pairs

    @property
    def charts(self) -> list[Chart]:
        """All charts."""
        single = [chart for chart in (self.training, self.importance) if chart]
        return [*(chart for m in self.measurements for chart in m.charts), *single, *self.attacks]


def contents(name: str, run: Run) -> Contents:
    """All of a run, under the name it has in the report."""
    summary = run.summary
    return Contents(
        name=name,
        promises=promises(run),
        asked=_asked(run),
        done=_done(run),
        measurements=_measurements(run),
        training=charts.training(run.steps) if run.steps else None,
        importance=charts.importance(run.importance) if run.importance else None,
        attacks=_attacks(run),
        attack_words=_attack_words(run),
        attack_titles=list((run.attacked or {}).get("titles", {}).items()),
        not_shown=_not_shown(run),
        settings=[(key, str(value)) for key, value in sorted(summary["settings"].items()) if value is not None],
        hashes=_hashes(run),
        versions=list(summary.get("versions", {}).items()),
        cost=_cost(run),
    )


def _asked(run: Run) -> Pairs:
    base = run.summary["base"]
    found = [("Model", f"{base['source']} ({base['architecture']}, {base['parameters']:,} parameters)")]
    for name, what in (("forget", "Forget"), ("retain", "Keep")):
        if part := run.data.get(name):
            cut = f", {part['truncated']} of them cut" if part["truncated"] else ""
            counted = f"{part['rows']} rows, {part['answer_tokens']} answer tokens{cut}"
            found.append((what, f"{counted}, from {part['source']}"))
    return found


def _done(run: Run) -> Pairs:
    s, export = run.summary["settings"], run.summary.get("export")
    if method := run.summary.get("method"):
        found = [("Method", method["title"])]
    else:
        found = [("Start", f"{s['init']}, rank {s['rank']}, alpha {s['alpha']:g}, layers {s['targets']}")]
    if run.steps and not method:
        against = f" against {s['retain_loss'] or 'its own retain loss'} x {s['lambda']:g}"
        length = f"{s['epochs']} epochs, {len(run.steps)} steps"
        found.append(("Training", f"{s['loss']}{against}, learning rate {learning_rate(run.summary):.2g}, {length}"))
    if export:
        checked = f"largest logit difference {export['max_logit_difference']:.1e} (bound {export['bound']:.1e})"
        found.append(("Adapter", f"{adapter_form(export)}, checked on the untouched base: {checked}"))
    if verdict := run.summary.get("verdict"):
        found.append(("The run's own verdict", verdict["text"]))
    return found


def _measurements(run: Run) -> list[Measurement]:
    found = [_measurement(suite) for suite in run.suites]
    checked = {when: run.checked(when) for when in ("before", "after")}
    if all(checked.values()):
        table = score_table(CHECK, checked, ("forget", "retain"))
        found.append(Measurement(table, [] if found else [c for c in (charts.intervals(table),) if c]))
    return found


def _measurement(suite: Suite) -> Measurement:
    sets = next(iter(suite.models.values())).evaluation.sets
    table = score_table(suite.name, {role: m.scores for role, m in suite.models.items()}, list(sets))
    ratios = {role: r for role, m in suite.models.items() if (r := truth_ratios(m)) is not None}
    drawn = [charts.intervals(table), charts.truth_ratio_curves(ratios) if ratios else None, tradeoff(table)]
    return Measurement(table, [chart for chart in drawn if chart], questions(suite))


def tradeoff(table: Table) -> Chart | None:
    """Forgetting against utility of the models in a table, by the first scores of each kind that two of them have."""
    scores = {row.key: row.cells for row in table.rows}
    names = [(f"forget_{one}", other) for one in KNOWLEDGE for other in UTILITY]
    for one, other in names:
        cells = zip(table.columns, scores.get(one, ()), scores.get(other, ()), strict=False)
        points = {c: (x, y) for c, x, y in cells if x and y and x.value is not None and y.value is not None}
        if len(points) > 1:
            rows = {r.key: r.name if r.set == SETS[""] else f"{r.name}, {r.set.lower()}" for r in table.rows}
            return charts.tradeoff(points, (rows[one], rows[other]))
    return None


def _attacks(run: Run) -> list[Chart]:
    before = run.checked("before")
    for suite in reversed(run.suites):
        before |= suite.models["before"].scores if "before" in suite.models else {}
    curves = [name for name in dict.fromkeys(p.attack for p in run.points) if charts.is_curve(run.points, name)]
    return charts.attack_forms(run.points, before) + [
        charts.attack_curve(name, [p for p in run.points if p.attack == name], before) for name in curves
    ]


def _attack_words(run: Run) -> list[str]:
    about = run.attacked or {}
    return [*about.get("verdict", []), *(rule["text"] for rule in about.get("gate", []))]


def _not_shown(run: Run) -> list[str]:
    """What was not measured and why, then what no measurement shows."""
    found = []
    if not (run.suites or run.purged):
        found.append(f"No evaluation was found beside the run: {UNMEASURED['after']}.")
    gone = f"the records of this evaluation were removed; the scores are still in {SCORES}"
    found += [f"{name}: {gone}." for name in run.purged]
    found += [f"{name}: it measured other weights than those that the run hands over now." for name in run.foreign]
    for suite in run.suites:
        missing = [UNMEASURED[role] for role in ROLES if role not in suite.models]
        found += [f"{suite.name}: no evaluation was found of {what}." for what in missing]
        undefined: dict[str, list[str]] = {}
        for role, measured in suite.models.items():
            for name, score in measured.scores.items():
                if score.value is None:
                    undefined.setdefault(f"{role}: {score.reason}", []).append(name)
        found += [f"{suite.name}, {reason}: {', '.join(names)}." for reason, names in undefined.items()]
        if not any("text" in r for m in suite.models.values() for rows in m.evaluation.sets.values() for r in rows):
            found.append(f"{suite.name}: questions and answers, as they were not kept (--keep-text).")
    if run.attacked is None:
        found.append("Attacks: none was run (lorasure attack RUN).")
    else:
        found += [f"Attack {x['attack']} ({x['subject']}): {x['reason']}." for x in run.attacked["not_run"]]
    if not run.importance:
        found.append("Importance by layer: the start of this run does not rest on it, or its files are gone.")
    if not run.steps:
        found.append("Training curves: the run was not trained yet.")
    return [*found, *ALWAYS_OPEN]


def _hashes(run: Run) -> Pairs:
    found = [(f"base {name}", value) for name, value in run.summary["base"]["files"].items()]
    found += [(f"{name} rows", part["sha256"]) for name, part in run.data.items()]
    found += sorted(run.files.items())
    for suite in run.suites:
        for role, measured in suite.models.items():
            sets = measured.evaluation.about["sets"].items()
            found += [(f"{suite.name}, {role}, set {name}", part["sha256"]) for name, part in sets]
    return found


def _cost(run: Run) -> Pairs:
    seconds = run.summary.get("seconds", {})
    found = [(stage, f"{value:.1f} s") for stage, value in seconds.items()]
    found += [("together", f"{sum(seconds.values()):.1f} s")] if seconds else []
    found += [
        (f"peak memory, {name}", f"{size / 2**30:.2f} GiB")
        for name, size in run.summary.get("peak_memory_bytes", {}).items()
    ]
    if run.steps:
        tokens, spent = sum(s["tokens"] for s in run.steps), sum(s["seconds"] for s in run.steps)
        found.append(("training", f"{tokens:,} tokens, {number(tokens / spent)} tokens/s"))
    for suite in run.suites:
        for role, m in suite.models.items():
            parts = ", ".join(f"{name} {value:.1f} s" for name, value in m.evaluation.about["seconds"].items())
            found.append((f"evaluation {suite.name}, {role}", parts))
    return found
