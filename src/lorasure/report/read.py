"""Run, evaluation and attack folders -> one plain data structure, joined by hashes. No model, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import artifacts
from ..errors import DataError, UsageError
from ..evaluate.evaluation import ABOUT, SCORES, Evaluation, check_comparable, read_evaluation
from ..evaluate.metrics import Score, forget_quality, truth_ratio_values
from ..outcome import weights_of

ROLES = ("before", "after", "retrained")  # the base as it was, with the run's adapter, trained without the forget set
# The first of these files that a folder has -> its kind; of an evaluation `purge` leaves the scores.
KINDS = {ABOUT: "evaluation", artifacts.ATTACK: "attack", artifacts.SUMMARY: "run", SCORES: "purged"}
Scores = dict[str, Score]


@dataclass(frozen=True)
class Measured:
    """One evaluation and its scores."""

    evaluation: Evaluation
    scores: Scores


@dataclass(frozen=True)
class Suite:
    """The evaluations on one suite that belong to a run: role -> Measured, in the order of ROLES."""

    name: str
    models: dict[str, Measured]

    def score(self, role: str, name: str) -> Score | None:
        """A score if it was measured and is defined."""
        found = self.models[role].scores.get(name) if role in self.models else None
        return found if found is not None and found.value is not None else None


@dataclass(frozen=True)
class Point:
    """Scores of the forget set at one point of an attack; `subject` is "unlearned" or "retrained".

    The attack "none" is the model as it is; an attack with one form has the point None.
    """

    attack: str
    point: float | None
    subject: str
    scores: Scores


@dataclass(frozen=True)
class Run:
    """A run folder and what belongs to it. What a stage has not written yet is empty.

    `files`: name -> sha256. `data`: empty after a purge. `steps`: lines of train.jsonl. `importance`: site -> mean
    entry of its map (importance/scores.py). `attacked`: attack.json, None if there is no such folder; `points`:
    its results. `purged`: names of evaluation folders of which only the scores are left. `foreign`: of folders that are
    named after the run and measured another's weights, or its own before they were exported again.
    """

    name: str
    folder: Path
    files: dict[str, str]
    summary: dict[str, Any]
    data: dict[str, Any]
    steps: list[dict[str, Any]]
    importance: dict[str, float]
    suites: list[Suite] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    attacked: dict[str, Any] | None = None
    purged: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def checked(self, when: str) -> Scores:
        """The run's own check, `when` "before" or "after": probability of the forget and the retain set."""
        return {f"{name}_probability": Score.from_json(part) for name, part in self.summary.get(when, {}).items()}

    @property
    def adapter(self) -> str | None:
        """sha256 of the weights that it hands over: its adapter's, where there is one."""
        return self.files.get(weights_of(self.files) or "")

    def role(self, about: Mapping[str, Any]) -> str | None:
        """What an evaluated model is to this run; None if it is another run's adapter or merged weights."""
        if about["adapter"]:
            return "after" if about["adapter"]["sha256"] == self.adapter else None
        weights = set(about["model"]["files"].values())
        merged = {digest for name, digest in self.files.items() if name.startswith(f"{artifacts.MERGED}/")}
        if weights and weights <= merged:
            return "after"
        if _identity(about["model"]) == _identity(self.summary["base"]):
            return "before"
        source = Path(about["model"]["source"])  # what a run has merged knew the text once, whichever run it was
        merged_by_a_run = source.name == artifacts.MERGED and (source.parent / artifacts.SUMMARY).is_file()
        return None if merged_by_a_run else "retrained"


def _identity(model: Mapping[str, Any]) -> Any:
    return model["files"] or (model["source"], model["revision"])


def truth_ratios(measured: Measured) -> np.ndarray | None:
    """Truth ratio R (TOFU, geometric mean) of every row of the forget set; None where it was not measured."""
    evaluation = measured.evaluation
    if not (evaluation.has("forget", "wrong_nll") and evaluation.has("forget", "paraphrase_nll")):
        return None
    return truth_ratio_values(*(evaluation.column("forget", name) for name in ("paraphrase_nll", "wrong_nll")))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs among `paths`, each with its evaluations and attacks: those among `paths`, and those found beside it.

    Beside it are the folders whose name is the run's and a hyphen; where they measure what one of `paths` measures,
    that one counts. What these were held against (`evaluate --reference`) is read where it lies, if it is still there.
    What lies beside one run serves another of the same base and forget set that has none of its own.
    What one of the runs made is never the retrained model of another. Raises UsageError without a run, DataError for a
    folder of another kind, one that belongs to no run, two that measure the same, and models of a run that were
    evaluated on other rows, template or tokenizer.
    """
    given = [(Path(path), _kind(Path(path))) for path in paths]
    runs = [_read_run(path) for path, kind in given if kind == "run"]
    if not runs:
        raise UsageError("Name at least one run folder, that of `lorasure forget --out`.")
    named = [path for path, kind in given if kind != "run"]
    homeless = [path for path in named if not any(_belongs(path, run, runs) for run in runs)]
    if homeless:
        names = ", ".join(run.name for run in runs)
        raise DataError(f"{homeless[0]}: it was made with another adapter than that of {names}.")
    around = [_beside(run, named) for run in runs]
    beside = [[path for path in paths if _belongs(path, run, runs)] for run, paths in zip(runs, around, strict=True)]
    found = []
    for run, paths, own in zip(runs, around, beside, strict=True):
        mine = [path for path in named if _belongs(path, run, runs)]
        purged = [path.name for path in (*mine, *own) if _kind(path) == "purged"]
        foreign = [path.name for path in paths if path not in own]
        others = [paths for other, paths in zip(runs, beside, strict=True) if _same_task(run, other)]
        lent = [path for paths in others for path in paths]
        more = [*_references([*mine, *own]), *lent, *_references(lent)]
        groups = [mine, own, *([path] for path in more if _belongs(path, run, runs))]
        found.append(_joined(replace(run, purged=purged, foreign=foreign), groups))
    return found


def _references(folders: Sequence[Path]) -> list[Path]:
    """The evaluations that those among `folders` were held against, as far as they are where they were."""
    found = []
    for folder in [folder for folder in folders if _kind(folder) == "evaluation"]:
        with artifacts.as_written(folder):
            reference = _about(folder)["settings"]["reference"]
            found += [Path(reference)] if reference and artifacts.exists(Path(reference) / ABOUT) else []
    return found


def _same_task(run: Run, other: Run) -> bool:
    return run is not other and _task(run) == _task(other) and _task(run)[1] is not None


def _task(run: Run) -> tuple[Any, Any]:
    """Which model and which forget set."""
    return _identity(run.summary["base"]), run.data.get("forget", {}).get("sha256")


def _kind(path: Path) -> str:
    for name, kind in KINDS.items():
        if (path / name).is_file():
            return kind
    raise DataError(f"{path}: neither a run nor an evaluation nor an attack folder (none of {', '.join(KINDS)}).")


def _read_run(path: Path) -> Run:
    files = artifacts.read_manifest(path)
    there = [name for name in (artifacts.DATA, artifacts.LOG, artifacts.START) if name in files]
    artifacts.check_run(path, artifacts.SUMMARY, *there)
    with artifacts.as_written(path):
        summary = artifacts.read_json(path / artifacts.SUMMARY)
        steps = _lines(path / artifacts.LOG) if artifacts.LOG in there else []
        start = artifacts.read_about(path / artifacts.START) if artifacts.START in there else {}
        data = artifacts.read_json(path / artifacts.DATA) if artifacts.DATA in there else {}
        run = Run(path.resolve().name, path, files, summary, data, steps, start.get("importance", {}))
        _task(run)
        return run


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _about(folder: Path) -> dict[str, Any]:
    name = next(name for name in KINDS if (folder / name).is_file())
    artifacts.check_run(folder, name)
    return artifacts.read_json(folder / name)


def _belongs(folder: Path, run: Run, runs: Sequence[Run]) -> bool:
    """Whether a folder measures this one of `runs`, or what it is held against: not a model that another made."""
    if _kind(folder) == "purged":
        return (folder / artifacts.MANIFEST).is_file()  # what it measured was removed as well
    with artifacts.as_written(folder):
        about = _about(folder)
        if _kind(folder) == "attack":
            return about["adapter"]["sha256"] == run.adapter
        role = run.role(about)
        if role == "retrained":
            return not any(other.role(about) == "after" for other in runs)
        return role is not None


def _beside(run: Run, named: Sequence[Path]) -> list[Path]:
    """Measured folders that begin with this run's name, not with another run's longer one; without `named`."""
    place = run.folder.resolve().parent
    folders = [path for path in sorted(place.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    names = [path.name for path in folders if (path / artifacts.SUMMARY).is_file()]
    found = []
    for path in folders:
        owners = [name for name in names if path.name.startswith(f"{name}-")]
        measured = any((path / name).is_file() for name in (ABOUT, artifacts.ATTACK, SCORES))
        if measured and owners and max(owners, key=len) == run.name:
            found.append(path)
    other = {path.resolve() for path in named}
    return [path for path in found if path.resolve() not in other]


def _joined(run: Run, groups: Sequence[Sequence[Path]]) -> Run:
    """The run with what `groups` of folders hold; what an earlier group measured counts."""
    suites: dict[str, dict[str, Measured]] = {}
    attacks: list[Path] = []
    for folders in groups:
        earlier = {(suite, role) for suite, models in suites.items() for role in models}
        for folder in [f for f in folders if _kind(f) == "evaluation"]:
            _add(run, suites, folder, earlier)
        attacks = attacks or [f for f in folders if _kind(f) == "attack"]
    if len(attacks) > 1:
        raise DataError(f"{attacks[0]} and {attacks[1]} both attack {run.name}; name the one that counts, and only it.")
    suites = {name: {role: models[role] for role in ROLES if role in models} for name, models in suites.items()}
    for models in suites.values():
        first, *rest = models.values()
        for other in rest:
            check_comparable(first.evaluation, other.evaluation)
    run = replace(run, suites=[Suite(name, _with_quality(models)) for name, models in suites.items()])
    return _attacked(run, attacks[0]) if attacks else run


def _add(run: Run, suites: dict[str, dict[str, Measured]], folder: Path, earlier: set[tuple[str, str]]) -> None:
    with artifacts.as_written(folder):
        evaluation = read_evaluation(folder)
        artifacts.check_run(folder, SCORES)
        scores = {name: Score.from_json(s) for name, s in artifacts.read_json(folder / SCORES).items()}
        about = evaluation.about
        suite = " ".join(part for part in (about["suite"], about["split"]) if part)
        role = str(run.role(about))
    if (suite, role) in earlier:
        return
    models = suites.setdefault(suite, {})
    if role in models:
        raise DataError(
            f"{models[role].evaluation.source} and {folder} both measure {run.name} ({suite}, {role}); "
            "name the one that counts, and only it."
        )
    models[role] = Measured(evaluation, scores)


def _with_quality(models: dict[str, Measured]) -> dict[str, Measured]:
    """The same, with forget quality where it was undefined because each model was evaluated on its own."""
    if "retrained" not in models:
        return models
    reference = truth_ratios(models["retrained"])
    found = dict(models)
    for role, measured in models.items():
        own = truth_ratios(measured)
        score = measured.scores.get("forget_quality")
        if role != "retrained" and score and score.value is None and own is not None and reference is not None:
            quality = forget_quality(own, reference)
            quality = replace(quality, extra=score.extra | quality.extra)
            found[role] = replace(measured, scores=measured.scores | {"forget_quality": quality})
    return found


def _attacked(run: Run, folder: Path) -> Run:
    artifacts.check_run(folder, artifacts.ATTACKS)
    with artifacts.as_written(folder):
        points = [
            Point(
                line["attack"],
                line["point"],
                line["subject"],
                {name: Score.from_json(score) for name, score in line["scores"].items()},
            )
            for line in _lines(folder / artifacts.ATTACKS)
        ]
    return replace(run, points=points, attacked=_about(folder))
