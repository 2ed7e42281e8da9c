"""When all trials are finished: the best of each method as a run, its evaluation, and what a search leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import artifacts, evaluating, folders, pipeline
from ..config import ForgetSettings
from ..evaluate.evaluation import ABOUT, SCORES
from ..evaluate.settings import EvaluateSettings
from ..lock import queued
from ..progress import Reporter
from .choose import chosen
from .picture import write_picture
from .spec import Spec
from .study import STOPPED, Study, Trial
from .trial import Runner

BEST = "best"
EVALUATIONS = "evaluations"
RESULT = "result.json"
TRIALS = "trials.jsonl"
REFERENCE = "retrained"


def finish(study: Study, runner: Runner, reporter: Reporter, *, trials_only: bool) -> dict[str, Any]:
    """The runs in best/, their evaluations, the picture and result.json, whose content is returned; once for all.

    Only here forget quality is measured, if there is a retrained model to compare with. `trials_only`: no runs.
    """
    folder, spec, original = study.folder, study.spec, runner.measure.original
    with queued(folder / BEST):
        result = _result(study, original)
        picked = {name: row["chosen"] for name, row in result["methods"].items() if row["chosen"]}
        runs = {}
        for name, line in () if trials_only else picked.items():
            runs[name] = runner.settings(Trial(name, line["trial"], line["params"]), folder / BEST / name)
        runner.bench.release_model()  # every run loads its own
        reference = _reference(spec, folder, reporter) if runs else None
        for name, settings in runs.items():
            _run(settings, reporter)
            measured = replace(spec.evaluation, adapter=settings.out, reference=reference)
            found = _evaluation(measured, folder / EVALUATIONS / name, reporter)
            result["methods"][name]["forget_quality"] = found["forget_quality"]
        write_trials(study)
        write_picture(folder, study.lines(), result)
        artifacts.write_json(folder / RESULT, result)
    return result


def _result(study: Study, original: Mapping[str, Any]) -> dict[str, Any]:
    level, floor = original["level"], study.spec.utility_floor
    methods = {}
    for name in study.spec.methods:
        own = [line for line in study.lines() if line["method"] == name]
        stopped = sum(line["state"] == STOPPED for line in own)
        best = chosen(own, level, floor)
        methods[name] = {"trials": len(own), "stopped": stopped, "chosen": best, "forget_quality": None}
    return {"methods": methods, "original": original["all"], "level": level, "utility_floor": floor}


def _run(settings: ForgetSettings, reporter: Reporter) -> None:
    out = Path(settings.out)
    if not (out / artifacts.MANIFEST).is_file():
        pipeline.forget(replace(settings, resume=_begun(out)), reporter)


def _begun(out: Path) -> bool:
    return folders.holds_progress(folders.partial_of(out))


def is_model(reference: str) -> bool:
    """Whether a reference is a model, here or on the hub, rather than an evaluation of one."""
    path = Path(reference).expanduser()
    return not path.exists() or (path / "config.json").is_file()


def _reference(spec: Spec, folder: Path, reporter: Reporter) -> str | None:
    """The evaluation of the retrained model, made if a model was given."""
    if spec.reference is None or not is_model(spec.reference):
        return spec.reference
    settings, out = replace(spec.evaluation, model=spec.reference, revision=None), folder / REFERENCE
    if _of_another(out, settings, "model"):
        compared = (folder / EVALUATIONS).iterdir()  # these do not tell that this is another model, so they go first
        for path in filter(Path.is_dir, (*compared, folders.partial_of(out), out)):
            shutil.rmtree(path)
    _evaluation(settings, out, reporter)
    return str(out)


def _evaluation(settings: EvaluateSettings, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Scores of an evaluation in `out`, which is made unless it is there with the same reference."""
    if _of_another(out, settings, "reference"):
        shutil.rmtree(out)
    if not (out / artifacts.MANIFEST).is_file():
        evaluating.evaluate_model(replace(settings, out=str(out), resume=_begun(out)), reporter)
    return artifacts.read_json(out / SCORES)


def _of_another(out: Path, settings: EvaluateSettings, key: str) -> bool:
    """Whether an evaluation, begun or done, has another model or reference (`key`): a SPEC's reference may change."""
    wanted = settings.located()[key]
    begun, done = folders.partial_of(out) / artifacts.IDENTITY, out / ABOUT
    return (begun.is_file() and artifacts.read_json(begun)["identity"].get(key, wanted) != wanted) or (
        done.is_file() and artifacts.read_json(done)["settings"][key] != wanted
    )


def write_trials(study: Study) -> None:
    """trials.jsonl: a line per trial that was begun."""
    path = study.folder / TRIALS
    with queued(path):
        artifacts.write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in study.lines()))
