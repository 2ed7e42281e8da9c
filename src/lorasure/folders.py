"""The life of a run folder: built under a hidden name beside its place, locked, kept when interrupted, then renamed.

A folder takes its name only with everything in it synced and `manifest.json` written last. What a killed or interrupted
run had finished stays in `.NAME.partial`, where `--resume` finds it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import artifacts
from .artifacts import IDENTITY, MANIFEST
from .config import Settings, flag
from .errors import KEPT, KEPT_TO_CHANGE, DataError, NumericError, ResourceError, UsageError
from .lock import beside, discard, is_ours, locked, recover
from .registry import lookup

# Written again at every start: a partial folder that holds nothing else has nothing that could be resumed.
WRITTEN_AT_START = {IDENTITY, MANIFEST, artifacts.CONFIG, artifacts.DATA, artifacts.LOG, artifacts.SUMMARY}
WRITTEN_AT_START |= {artifacts.FINETUNED}


def partial_of(out: Path) -> Path:
    """Where a run is built before it takes the name `out`."""
    return beside(out.resolve(), "partial")


def check_new_file(path: Path, flag: str, overwrite: bool, reads: Collection[Path]) -> None:
    """Refuse to replace what is there, unless it is a file and may go, nor change what is read, or a finished run."""
    for place in (path.resolve(), *path.resolve().parents):
        if place in [read.resolve() for read in reads] or artifacts.is_sealed(place):
            raise UsageError(f"{flag} {path}: {place} is read, or finished, and stays as it is; choose another one.")
    if path.exists() and not (overwrite and path.is_file()):
        raise UsageError(f"{flag} {path}: there is something of that name. Choose another one, or add --overwrite.")


def check_new(
    out: Path,
    overwrite: bool = False,
    resume: bool = False,
    reads: Mapping[str, str] | None = None,
    mark: str = MANIFEST,
) -> None:
    """Refuse an output folder that cannot be made or resumed, or whose content the user did not say to replace.

    What gets replaced is deleted, so only a folder with a manifest of ours is, and with the file `mark` that this kind
    of command leaves: never somebody's home by a slip, nor a run by its evaluation. Nor one that holds anything of what
    the command `reads` (flag -> path): the base of a run stays untouched.
    """
    _check_place(out)
    for name, path in (reads or {}).items():
        read = Path(path)
        if overwrite and read.exists() and out.resolve() in (read.resolve(), *read.resolve().parents):
            raise UsageError(f"--out {out}: --overwrite would delete what is read, {name} {path}; choose another one.")
    if partial_of(out).exists():
        with locked(out.resolve()):
            pass
    _check_content(out, overwrite, resume)
    if overwrite and (out / MANIFEST).is_file() and not (out / mark).is_file():
        raise UsageError(f"--out {out}: another kind of command made it (there is no {mark}); choose another one.")


def read_by(settings: Settings) -> dict[str, str]:
    """What a command reads: flag -> path. An earlier run's importance may give way to the run that used it."""
    paths = (f.name for f in fields(settings) if f.metadata.get("path") and f.name not in ("out", "importance"))
    return {flag(name): path for name in paths if (path := getattr(settings, name))}


def _check_place(out: Path) -> None:
    try:
        out.resolve()
    except RuntimeError as error:  # Python 3.11 and 3.12; later versions leave it to mkdir
        raise UsageError(f"--out {out}: its links lead in a circle.") from error
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: this is a file, a folder is wanted.")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UsageError(f"--out {out}: {parent} is a file, a folder is wanted.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(f"--out {out}: no permission to write in {parent}.")
    if not (out / MANIFEST).is_file():  # what is there already, made before this was refused, can be changed
        for place in filter(artifacts.is_sealed, out.resolve().parents):
            raise UsageError(f"--out {out}: {place} is finished, and stays as it is; choose another one.")


def _check_content(out: Path, overwrite: bool, resume: bool, replace: bool = False) -> None:
    for path in (partial_of(out), beside(out.resolve(), "old")):
        if os.path.lexists(path) and not is_ours(path):
            raise UsageError(f"--out {out}: {path} is in the way, and not this program's; rename it.")
    worth = holds_progress(partial_of(out))
    if worth and not (overwrite or resume):
        raise UsageError(
            f"--out {out}: an interrupted run is in {partial_of(out)}. "
            "Continue it with --resume on the command that began it, or throw it away with --overwrite."
        )
    if out.is_dir() and any(out.iterdir()):
        ours = (out / MANIFEST).is_file()
        if overwrite and not ours:
            raise UsageError(f"--out {out}: --overwrite replaces earlier runs only, and there is no {MANIFEST} in it.")
        if resume and not (overwrite or replace or worth) and ours:
            raise UsageError(f"--out {out}: this run is complete, there is nothing to resume.")
        if not (overwrite or replace) and not (worth and _may_replace(partial_of(out))):
            raise UsageError(f"--out {out}: the folder is not empty. Choose another one, or add --overwrite.")


def holds_progress(partial: Path) -> bool:
    """Whether a partial folder has an identity and anything beyond what every start writes."""
    if not (partial / IDENTITY).is_file():
        return False
    started = set(WRITTEN_AT_START)
    with suppress(DataError, KeyError, TypeError):  # a damaged identity is refused when it is to be resumed
        started |= set(artifacts.read_json(partial / IDENTITY)["carried"])
    files = (p.relative_to(partial) for p in partial.rglob("*") if p.is_file())
    return any(p.as_posix() not in started and not artifacts.is_unfinished(p) for p in files)


@contextmanager
def resumable_folder(
    out: Path,
    identity: Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    carry: Collection[str] = (),
    allow_change: Collection[str] | None = None,
    note: Callable[[str], None] | None = None,
) -> Iterator[Path]:
    """A private, locked folder `.NAME.partial` that takes the name `out` only if the block ends without an error.

    `identity`: flat, JSON-able; everything the result depends on, under the names that --allow-change takes. It is
    stored in identity.json and must be the same when the folder is resumed, but for the keys in `allow_change`, whose
    changes are recorded there (None: the command has no such flag). `resume` continues in the folder that an
    interrupted block left behind (none: it starts as usual and says so through `note`); `overwrite` allows to replace
    the run at `out` and, without `resume`, to throw away what an interrupted one left. The run that is replaced stays
    until the new one is complete. `carry`: make a new version of that run, which starts from these files of it.

    When the block raises, the folder stays if it holds anything beyond what every start writes, and the error gets a
    note that says so; but a UsageError removes a folder that this block began, as a corrected flag would not fit it.
    Raises UsageError listing what differs, ResourceError when another process works on the same folder.
    """
    values = json.loads(json.dumps(identity, allow_nan=False))
    with _work_folder(out, overwrite, resume, replace=bool(carry)) as (partial, fresh):
        if fresh:
            if resume and note:
                note(f"--resume: nothing is there to resume for {out}; a new run starts.")
            stored = {"identity": values, "changed": [], "run": secrets.token_hex(8)}
            stored |= {"replaces": overwrite or bool(carry), "carried": list(carry)}
            artifacts.copy_files(out, partial, carry)
        else:
            stored = _checked(partial, values, allow_change, overwrite)
        artifacts.write_json(partial / IDENTITY, stored)
        yield partial


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A private folder that takes the name `out` only if the block ends without an error; else nothing is left.

    A folder that it replaces stays until then.
    """
    with _work_folder(out, overwrite) as (partial, _):
        yield partial


@contextmanager
def changed_run(run: Path, keep: Iterable[str], overwrite: bool = False) -> Iterator[Path]:
    """A new version of a run, starting from some of its files: takes its place whole, or the run stays as it was.

    `overwrite`: throw away what an interrupted command left beside it.
    """
    with _work_folder(run, overwrite, replace=True) as (partial, _):
        artifacts.copy_files(run, partial, keep)
        yield partial


@contextmanager
def _work_folder(
    out: Path, overwrite: bool, resume: bool = False, replace: bool = False
) -> Iterator[tuple[Path, bool]]:
    """(partial folder, whether it is new): published when the block ends well, else kept if there is a reason to."""
    _check_place(out)
    out = out.resolve()
    with _parents(out), locked(out), artifacts.disk_errors():
        _check_content(out, overwrite, resume, replace)
        partial = partial_of(out)
        fresh = not (resume and holds_progress(partial))
        if fresh:
            discard(partial)
            partial.mkdir(mode=0o700)
        else:
            artifacts.remove_unfinished(partial)
        try:
            if fresh:
                artifacts.begin(partial)
            yield partial, fresh
            _publish(partial, out)
        except BaseException as error:
            if not holds_progress(partial) or (fresh and isinstance(error, UsageError)):
                discard(partial)
            elif not isinstance(error, UsageError):  # the same command would be refused again
                error.add_note(KEPT_TO_CHANGE if isinstance(error, NumericError) and _has_rate(partial) else KEPT)
            raise


def _has_rate(partial: Path) -> bool:
    """Whether a learning rate is among what the result depends on."""
    return "lr" in artifacts.read_json(partial / IDENTITY)["identity"]


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the folders above `out`; those that are empty after an error go again."""
    made = [p for p in out.parents if not p.exists()]
    for folder in reversed(made):
        folder.mkdir(mode=0o700, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # something is in it
                folder.rmdir()
        raise


def _may_replace(partial: Path) -> bool:
    """Whether the run that was interrupted had been told that it may replace what has its name."""
    stored = artifacts.read_json(partial / IDENTITY)
    return isinstance(stored, dict) and stored.get("replaces") is True


def _checked(partial: Path, identity: Mapping[str, Any], allow_change: Collection[str] | None, overwrite: bool) -> dict:
    """identity.json as it is to be from now on. Raises UsageError with every difference that is not allowed."""
    stored = artifacts.read_json(partial / IDENTITY)
    if not isinstance(stored, dict) or not stored.keys() >= {"identity", "changed", "replaces", "run", "carried"}:
        raise UsageError(f"{partial}: its {IDENTITY} is another program's; add --overwrite instead of --resume.")
    before = stored["identity"]
    for key in allow_change or ():
        lookup(dict.fromkeys({**before, **identity}), key, "--allow-change")
    differ = [k for k in {**before, **identity} if before.get(k) != identity.get(k)]
    refused = [k for k in differ if k not in (allow_change or ())]
    if refused:
        shown = "; ".join(f"{k}: {before.get(k)} -> {identity.get(k)}" for k in refused)
        more = f", or continue all the same with --allow-change {','.join(refused)}" if allow_change is not None else ""
        raise UsageError(
            f"--resume: not the run that was interrupted ({shown}). Go back to the first value, or start anew with "
            f"--overwrite{more}."
        )
    changed = [{"key": k, "from": before.get(k), "to": identity.get(k)} for k in differ]
    return {
        **stored,
        "identity": dict(identity),
        "changed": [*stored["changed"], *changed],
        "replaces": overwrite or stored["replaces"],
    }


def _publish(partial: Path, out: Path) -> None:
    """Everything to the disk, the manifest last; then the name."""
    for path in partial.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
        artifacts.sync(path)
    artifacts.write_manifest(partial)
    artifacts.sync(partial)
    _swap(partial, out, beside(out, "old"))
    artifacts.sync(out.parent)
    discard(beside(out, "old"))


def _swap(new: Path, out: Path, old: Path) -> None:
    """Give `new` the name `out`; what had it is kept as `old`, and comes back if that fails."""
    if not out.exists():
        new.rename(out)
        return
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise


def verify(run: Path) -> None:
    """Every file of a run against its manifest. Raises DataError naming all that are missing, changed or extra."""
    recover(run)
    if found := artifacts.differences(run):
        raise DataError(f"{run}: not what its {MANIFEST} says: {', '.join(found)}.")
