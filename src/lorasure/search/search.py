"""`lorasure search`: the same number of trials for every method, by any number of workers; then the best of each."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import artifacts, folders, libraries
from ..errors import KEPT, DataError, UsageError, one_line
from ..evaluate.evaluation import check_comparable
from ..evaluate.logs import open_evaluation
from ..failures import explained
from ..identity import identity
from ..interrupt import sigterm_unwinds
from ..lock import PAUSE, queued
from ..model_files import check_model_folder
from ..models import load_tokenizer
from ..progress import Reporter
from .finish import BEST, EVALUATIONS, finish, is_model, write_trials
from .read import read_spec
from .settings import SearchSettings
from .spec import Spec
from .study import LOCKS, Study, need_optuna
from .trial import IMPORTANCE, Runner

ABOUT = "search.json"


def search(spec_path: Path, settings: SearchSettings, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run or continue a search; returns what result.json holds.

    Raises UsageError, DataError, ResourceError. What was finished before an error or an interruption is kept in the
    folder, for `resume`.
    """
    reporter = reporter or Reporter(quiet=True)
    need_optuna()
    spec = read_spec(spec_path)
    folder = Path(settings.out)
    _check_folder(folder, settings.resume)
    runner = Runner(folder, spec, reporter, _device(spec, 0))
    runner.check()
    _check_reference(spec, runner)
    _open(runner, settings.resume)
    if spec.evaluation.suite == "own" and spec.evaluation.retain == spec.base.retain:
        reporter.note("utility is measured on rows that training may use as well; evaluation: retain: names others.")
    study = Study(folder, spec)
    try:
        with _helpers(spec_path, settings, study):
            _share_cores(settings.workers)
            work(study, runner, reporter)
        return finish(study, runner, reporter, trials_only=settings.trials_only)
    except BaseException as error:
        if not isinstance(error, UsageError):  # the same command would be refused again
            error.add_note(KEPT)
        raise


def work(study: Study, runner: Runner, reporter: Reporter) -> None:
    """Run trials until all are finished, whoever runs them; those of workers that died are taken up."""
    parent = multiprocessing.parent_process()
    while not study.finished and (parent is None or parent.is_alive()):
        with study.next_trial() as trial:
            if trial is None:
                time.sleep(10 * PAUSE)
                continue
            result, value = runner.run(trial)
            study.finish(trial, result, value)
            shutil.rmtree(study.folder / LOCKS / trial.name)
        write_trials(study)
        reporter.note(_line(trial.name, result))


def _line(name: str, result: dict[str, Any]) -> str:
    said = f"stopped: {result.get('reason')}"
    if scores := result.get("scores"):
        said = f"extraction strength {scores['extraction_strength']:.4f}, utility {scores['share']:.1%} of the original"
    return f"{name}: {said}, {result['seconds']:.1f} s"


def _check_folder(folder: Path, resume: bool) -> None:
    there = folder.is_dir() and any(not artifacts.is_unfinished(path) for path in folder.iterdir())
    ours = (folder / ABOUT).is_file()
    if ours and not resume:
        raise UsageError(f"--out {folder}: a search is there. Add --resume to continue or join it.")
    if there and not ours:
        raise UsageError(f"--out {folder}: the folder is not empty. Choose another one.")
    if not there:
        folders.check_new(folder)


def _open(runner: Runner, resume: bool) -> None:
    """The folder with search.json, made now or by another worker, for the same search."""
    folder, wanted = runner.folder.resolve(), _identity(runner)
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with queued(folder):
        _check_folder(folder, resume)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not (folder / ABOUT).is_file():
            artifacts.write_json(folder / ABOUT, wanted)
        for name in (LOCKS, IMPORTANCE, BEST, EVALUATIONS):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        stored = artifacts.read_json(folder / ABOUT)
    if differ := [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]:
        shown = "; ".join(f"{key}: {stored.get(key)} -> {wanted.get(key)}" for key in differ)
        raise UsageError(f"--resume: not the search in {runner.folder} ({shown}). Choose another --out.")


def _identity(runner: Runner) -> dict[str, Any]:
    """All that the trials depend on, flat. Paths are left out: hashes say what is in them."""
    spec = runner.spec
    data: dict[str, Any] = dict(zip(("forget", "retain"), runner.bench.data, strict=True))
    found: dict[str, Any] = {}
    for name, part in runner.measure.about["sets"].items():
        found |= {f"evaluation.{name}": part["sha256"], f"evaluation.{name} tokens": part["tokens"]}
    for name, method in spec.methods.items():
        own = identity(method.settings, data, runner.bench.fingerprint)
        found |= {f"{name}.{key}": value for key, value in own.items() if key not in method.ranges}
        for key, r in method.ranges.items():
            found[f"{name}.{key}"] = list(r.choices) or f"{r.low} to {r.high}, log: {r.log}"
    numbers = ("trials", "sampler", "seed", "utility_floor")
    return found | {"suite": spec.evaluation.suite} | {key: getattr(spec, key) for key in numbers}


def _check_reference(spec: Spec, runner: Runner) -> None:
    """Before hours of work: an evaluation of a retrained model must be of the same rows, a model must be there."""
    if spec.reference is None:
        return
    if is_model(spec.reference):
        try:
            check_model_folder(spec.reference, spec.base.allow_pickle)
            load_tokenizer(spec.reference, allow_pickle=spec.base.allow_pickle)  # of the hub, too: its least file
        except DataError as error:
            raise DataError(f"reference: {error}".replace("--model ", "", 1)) from error
    else:
        check_comparable(runner.measure.to_be(), open_evaluation(Path(spec.reference)))


def _device(spec: Spec, number: int) -> str:
    """Workers on a machine with several accelerators take one each, in turn."""
    count = torch.accelerator.device_count() if spec.base.device == "auto" else 0
    if count < 2:
        return spec.base.device
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator
    return f"{accelerator.type}:{number % count}"


def _share_cores(workers: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@contextmanager
def _helpers(spec_path: Path, settings: SearchSettings, study: Study) -> Iterator[None]:
    """The other workers of this machine, processes of their own that end with the block."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit our locks
    numbers = range(1, settings.workers)
    arguments = [(spec_path, study.folder, number, settings.workers) for number in numbers]
    processes = [context.Process(target=_helper, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()  # it finishes its step first, and what it had done is taken up later
        for process in processes:
            process.join()


def _helper(spec_path: Path, folder: Path, number: int, workers: int) -> None:
    """A worker beside the first one; its trial is somebody else's to take up if anything happens to it."""
    reporter = Reporter()
    libraries.settle()
    try:
        with sigterm_unwinds():
            spec = read_spec(spec_path)
            runner = Runner(folder, spec, Reporter(quiet=True), _device(spec, number))
            _share_cores(workers)
            work(Study(folder, spec), runner, reporter)
    except KeyboardInterrupt:
        pass
    except Exception as error:  # in the words that the first worker's would have; a traceback may quote rows
        reporter.note(f"worker {number + 1}: {one_line(explained(error)[0])}")
