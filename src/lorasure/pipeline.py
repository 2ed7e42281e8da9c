"""The commands: `forget` is all stages on one loaded model; the others are one stage each and meet in a run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import artifacts, folders, lora, processes
from .checkpoint import FOLDER as CHECKPOINTS
from .config import (
    AUTO,
    PER_CALL,
    ExportSettings,
    ForgetSettings,
    ImportanceSettings,
    InitSettings,
    Settings,
    TrainSettings,
    flag,
)
from .errors import DataError, UsageError
from .fitting import fit_memory
from .identity import ANY_TIME, allowed_changes, check_unsettled, identity, of_scores
from .model_files import CONFIG
from .outcome import RATE
from .progress import Reporter
from .stages import (
    Start,
    export,
    load_importance,
    make_start,
    measure_importance,
    update_summary,
)
from .train_stage import attach_start, train_adapter
from .workbench import Workbench, check_used
from .yaml_file import read_yaml, write_yaml

# The stages, as the account of the time names them, that a command makes anew, in their order.
EXPORTING = ("export", "evaluate", "merge")
TRAINING = ("level", "reference", "calibrate", "train", *EXPORTING)
STARTING = ("activations", "init", *TRAINING)


@dataclass(frozen=True)
class Result:
    """What `forget` hands over: the run folder and its summary (the content of summary.json)."""

    folder: Path
    summary: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The plain PEFT adapter for the untouched base."""
        return self.folder / artifacts.ADAPTER


def forget(settings: ForgetSettings, reporter: Reporter | None = None) -> Result:
    """The main command: from a model and two files to a checked adapter in `settings.out`.

    Raises UsageError, DataError, NumericError, ResourceError (see errors.py). What was finished before an error or an
    interruption is kept beside `out`, for `resume`.
    """
    with _new_run(settings, reporter) as (bench, run):
        start = started(bench, run)
        trained = _finished(bench, run, artifacts.LOG) and _finished(bench, run, artifacts.TRAINED)
        adapted = _trained if trained else train_adapter
        summary = export(bench, run, start, partial(adapted, bench, run, start))
    return Result(Path(settings.out), summary)


def started(bench: Workbench, run: Path) -> Start:
    """Stages 1 and 2, or what is left of them. Importance is in memory no longer than that."""
    measured = _finished(bench, run, artifacts.IMPORTANCE)
    if (measured or not bench.measures_importance) and _finished(bench, run, artifacts.START):
        return Start.load(run / artifacts.START, bench.sites)
    importance = load_importance(bench, run) if measured else measure_importance(bench, run)
    return make_start(bench, run, importance)


def importance_command(settings: ForgetSettings, reporter: Reporter | None = None) -> Path:
    """Stage 1 alone: a run folder with the settings, the account of the data, and the importance."""
    with _new_run(settings, reporter) as (bench, run):
        if measure_importance(bench, run) is None:
            bench.reporter.note(f"--init {settings.init} needs no importance, so none was measured.")
    return Path(settings.out)


def init_command(run: Path, settings: ForgetSettings, reporter: Reporter | None = None) -> Path:
    """Stage 2 on an existing run, from its importance (or from new activations). Later stages' files go."""
    check_used(settings)
    made = artifacts.read_manifest(run)
    bench = _reopen(run, settings, reporter, "init", InitSettings, ImportanceSettings, TrainSettings, ExportSettings)
    _check_worth(run, settings.overwrite)
    another = settings.located()["importance"] != read_yaml(run / artifacts.CONFIG).get("importance")
    if another:
        _check_importance(settings)
    importance = load_importance(bench, run) if bench.measures_importance and not another else None
    kept, anew = ([], ("importance", *STARTING)) if another else ([artifacts.IMPORTANCE], STARTING)
    with folders.changed_run(run, kept, settings.overwrite) as changed:
        _check_still(run, made)
        write_inputs(bench, changed, earlier=_earlier(run, anew))
        make_start(bench, changed, measure_importance(bench, changed) if another else importance)
    return run


def train_command(run: Path, settings: ForgetSettings, reporter: Reporter | None = None) -> Path:
    """Stage 3 on an existing run, from its init.safetensors. Later stages' files go."""
    artifacts.check_run(run, artifacts.START)
    made = artifacts.read_manifest(run)
    bench = _reopen(run, settings, reporter, "train", TrainSettings, ExportSettings)
    goes_on = settings.resume and folders.holds_progress(folders.partial_of(run))
    _check_worth(run, settings.overwrite or goes_on)
    with _resumable(bench, run, carry=[artifacts.IMPORTANCE, artifacts.START]) as changed:
        _check_still(run, made)
        if not (changed / artifacts.START).is_file():
            raise UsageError(f"{changed}: it is before its {artifacts.START}; --resume the command that began it.")
        train_adapter(bench, changed, Start.load(changed / artifacts.START, bench.sites))
    return run


def export_command(run: Path, settings: ForgetSettings, reporter: Reporter | None = None) -> Result:
    """Stage 4 on an existing run, from its trained.safetensors: another rank, merged weights."""
    artifacts.check_run(run, artifacts.START, artifacts.TRAINED)
    made = artifacts.read_manifest(run)
    bench = _reopen(run, settings, reporter, "export", ExportSettings)
    start = Start.load(run / artifacts.START, bench.sites)
    with artifacts.as_written(run / artifacts.SUMMARY):
        known = artifacts.read_json(run / artifacts.SUMMARY)
        _ = known["before"]  # `export` compares with it
    kept = [artifacts.IMPORTANCE, artifacts.START, artifacts.TRAINED, artifacts.LOG]
    with folders.changed_run(run, kept, settings.overwrite) as changed:
        _check_still(run, made)
        update_summary(changed, known | _earlier(run, EXPORTING))
        write_inputs(bench, changed)
        summary = export(bench, changed, start, partial(_trained, bench, run, start))
    return Result(run, summary)


def _trained(bench: Workbench, run: Path, start: Start) -> lora.PeftModel:
    """The trained model of a run, rebuilt from its files."""
    trained = Start.load(run / artifacts.TRAINED, bench.sites)
    if trained.layout() != start.layout():
        raise DataError(f"{run}: {artifacts.TRAINED} and {artifacts.START} are not of the same run.")
    wrapped = attach_start(bench, start)
    lora.set_trained(wrapped, trained.factors)
    return wrapped


def _check_worth(run: Path, wanted: bool) -> None:
    """What took long to make is not thrown away unless that is what the user `wanted`."""
    if artifacts.TRAINED in artifacts.read_manifest(run) and not wanted:
        text = f"it holds {artifacts.TRAINED}, which would go; add --overwrite to start from this stage once more."
        raise UsageError(f"{run}: {text}")


def _check_still(run: Path, made: Mapping[str, Any]) -> None:
    """No other command has changed the run while this one was reading it; from now on it is locked."""
    if artifacts.read_manifest(run) != made:
        raise UsageError(f"{run}: another command has changed it meanwhile; start this one again.")


def _check_importance(settings: ForgetSettings) -> None:
    if settings.importance and not Path(settings.importance).is_dir():
        raise UsageError(f"--importance {settings.importance}: there is no such run folder.")


@contextmanager
def _new_run(settings: ForgetSettings, reporter: Reporter | None) -> Iterator[tuple[Workbench, Path]]:
    """A checked workbench and the folder of a new run. What is wrong with the input shows before a folder exists."""
    with processes.joined(), _own_place(settings) as own:
        out = Path(own.out)
        folders.check_new(out, own.overwrite, own.resume, folders.read_by(own), artifacts.SUMMARY)
        bench = Workbench(own, reporter)
        check_used(own)
        _check_importance(own)
        with bench.reporter.held():
            fit_memory(bench)
            bench.prepare()
        with _resumable(bench, out) as run:
            yield bench, run


@contextmanager
def _own_place(settings: ForgetSettings) -> Iterator[ForgetSettings]:
    """Only the first of several processes writes the run; the others work in a folder that goes afterwards."""
    if processes.size() > 1 and settings.resume:
        raise UsageError("--resume goes on in one process; the result is the same up to the order of summation.")
    if processes.rank() == 0:
        yield settings
        return
    with tempfile.TemporaryDirectory() as folder:
        yield replace(settings, out=str(Path(folder) / "run"), overwrite=False)


@contextmanager
def _resumable(bench: Workbench, out: Path, carry: Sequence[str] = ()) -> Iterator[Path]:
    """The folder of a run, new or interrupted; `carry`: files that a new version of the run at `out` starts from."""
    s = bench.settings
    data = {"forget": bench.data[0], "retain": bench.data[1]} | ({"unseen": bench.unseen} if bench.unseen else {})
    allowed = allowed_changes(s)
    check_unsettled(folders.partial_of(out), allowed)
    with folders.resumable_folder(
        out,
        identity(s, data, bench.fingerprint),
        resume=s.resume,
        overwrite=s.overwrite,
        carry=carry,
        allow_change=allowed,
        note=bench.reporter.note,
    ) as run:
        write_inputs(bench, run, earlier=_earlier(out, TRAINING) if carry else {})
        yield run


def _finished(bench: Workbench, run: Path, name: str) -> bool:
    """Whether an earlier attempt has made this file; one that is damaged is made again."""
    if not (run / artifacts.MANIFEST).is_file() or name not in artifacts.read_manifest(run):
        return False
    try:
        artifacts.check_run(run, name)
    except DataError as error:
        bench.reporter.note(f"{error} It is made again.")
        return False
    return True


def _reopen(
    run: Path, settings: ForgetSettings, reporter: Reporter | None, stage: str, *changing: type[Settings]
) -> Workbench:
    """A workbench for one stage of an existing run. Only settings of `changing` may differ; data and model may not."""
    artifacts.check_run(run, artifacts.CONFIG, artifacts.DATA, artifacts.SUMMARY)
    stored = read_yaml(run / artifacts.CONFIG)
    may_change = ANY_TIME | {f.name.rstrip("_") for part in changing for f in fields(part)}
    for name, value in settings.located().items():
        if name not in may_change and value != stored.get(name):
            raise UsageError(f"{flag(name)} is settled by an earlier stage of {run}; start a new run to change it.")
    bench = Workbench(settings, reporter)
    fit_memory(bench, stage)
    bench.prepare()
    with artifacts.as_written(run):
        data, base = artifacts.read_json(run / artifacts.DATA), artifacts.read_json(run / artifacts.SUMMARY)["base"]
        checks = [
            (f"--model {settings.model}: the weights have", bench.fingerprint["files"], base["files"]),
            (f"--model {settings.model}: its {CONFIG} has", bench.fingerprint["config"], base.get("config")),
        ]
        for name, part in zip(("forget", "retain"), bench.data, strict=True):
            where, before = f"--{name} {part.source}", data[name]
            checks.append((f"{where}: the rows have", part.text_hash, before["sha256"]))
            checks.append((f"{where}: its tokens or groups have", part.tokens_hash, before.get("tokens_sha256")))
    for what, now, before in checks:
        if before is not None and now != before:  # runs of before do not say all of it
            raise DataError(f"{what} changed since {run} was made; start a new run.")
    return bench


def _earlier(run: Path, anew: Sequence[str]) -> dict[str, Any]:
    """Of a run's summary, what holds for its next version: its changes, the seconds of stages not made `anew`."""
    with artifacts.as_written(run / artifacts.SUMMARY):
        known = artifacts.read_json(run / artifacts.SUMMARY)
        seconds = {stage: took for stage, took in known.get("seconds", {}).items() if stage not in anew}
        return {"seconds": seconds, "changed": known.get("changed", [])}


def write_inputs(
    bench: Workbench, run: Path, given: Settings | None = None, earlier: Mapping[str, Any] | None = None
) -> None:
    """config.yaml, data.json, and what summary.json says of settings and base, and from now on of the time.

    `given`: the settings of another command; `earlier`: of a run that has not begun yet, what it goes on from.
    """
    settings = {name: value for name, value in (given or bench.settings).located().items() if name not in PER_CALL}
    bench.run = run
    write_yaml(run / artifacts.CONFIG, settings)
    artifacts.write_json(
        run / artifacts.DATA, dict(zip(("forget", "retain"), (part.about() for part in bench.data), strict=True))
    )
    path = run / artifacts.SUMMARY
    known = artifacts.read_json(path) if path.is_file() else dict(earlier or {})
    changed, now = known.get("changed", []), _changed_now(run, known.get("changed", []))
    if any(of_scores(change["key"]) for change in now):
        known.pop("before", None)
    if now and bench.settings.lr == AUTO and not any((run / CHECKPOINTS).glob("*")):  # nothing was trained with it yet
        known.pop(RATE, None)
    known |= {"base": bench.fingerprint, "settings": settings, "changed": [*changed, *now]}
    artifacts.write_json(path, {"guards": [], **known})
    with artifacts.as_written(path):
        bench.reporter.go_on(known.get("seconds", {}), lambda spent: update_summary(run, {"seconds": spent}))


def _changed_now(run: Path, known: Sequence[Any]) -> list[Any]:
    """What --allow-change has allowed since the summary was last written, which names what is `known`."""
    path = run / artifacts.IDENTITY
    return [change for change in artifacts.read_json(path)["changed"] if change not in known] if path.is_file() else []
