"""Files of a run: the only module that knows their formats. safetensors and JSON, written whole or not at all.

A run folder is built under a hidden name beside its final place and renamed when its manifest is in it. A stage that
adds to a finished run builds the new version of it in the same way. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import DataError, ResourceError, UsageError

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
DATA = "data.json"
IMPORTANCE = "importance.safetensors"
START = "init.safetensors"
TRAINED = "trained.safetensors"
LOG = "train.jsonl"
SUMMARY = "summary.json"
ADAPTER = "adapter"
MERGED = "merged"


def check_new(out: Path, overwrite: bool = False) -> None:
    """Refuse an output folder that cannot be made, or that holds anything, unless the user said to replace that run.

    What gets replaced is deleted, so only a folder with a manifest of ours is: never somebody's home by a slip.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: this is a file, a folder is wanted.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"--out {out}: the folder is not empty. Choose another one, or add --overwrite.")
        if not (out / MANIFEST).is_file():
            raise UsageError(f"--out {out}: --overwrite replaces earlier runs only, and there is no {MANIFEST} in it.")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UsageError(f"--out {out}: {parent} is a file, a folder is wanted.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(f"--out {out}: no permission to write in {parent}.")


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A private folder that takes the name `out` only if the block ends without an error; else nothing is left.

    A folder that it replaces stays until then.
    """
    check_new(out, overwrite)
    out = out.resolve()
    made = [p for p in out.parents if not p.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.parent / f".{out.name}.{what}-{os.getpid()}" for what in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    try:
        yield partial
        write_manifest(partial)
        _make_private(partial)
        _swap(partial, out, old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # somebody else may have put something there meanwhile
                folder.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def changed_run(run: Path, keep: Iterable[str]) -> Iterator[Path]:
    """A new version of a run, starting from some of its files: takes its place whole, or the run stays as it was."""
    with new_folder(run, overwrite=True) as partial:
        for name in keep:
            if (run / name).is_file():
                _link(run / name, partial / name)
        yield partial


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has none. Files of a run never change in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


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


def _make_private(folder: Path) -> None:
    for path in folder.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, synced and renamed to `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, whole or not at all."""
    with _beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys; NaN and infinity are refused, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_yaml(path: Path, value: Any) -> None:
    """YAML in the order given."""
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def read_json(path: Path) -> Any:
    """What a JSON file holds; a DataError if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a readable JSON file ({type(error).__name__}).") from error


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, loaded safely; a DataError if it is none."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not a readable YAML file ({type(error).__name__}).") from error


def write_tensors(path: Path, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Tensors as safetensors; `about` (units, normalisation, counts, hashes) goes into the header as JSON."""
    from safetensors.torch import save_file

    stored: dict[str, Any] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        stored[name] = own.clone() if own.data_ptr() in seen else own  # safetensors refuses two names for one memory
        seen.add(own.data_ptr())
    with _beside(path) as partial:
        save_file(stored, partial, metadata={"lorasure": json.dumps(about, sort_keys=True, allow_nan=False)})


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, about) of a file written by `write_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["lorasure"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a file that this program wrote ({type(error).__name__}).") from error


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of everything that can change a result."""
    import platform
    from importlib.metadata import version

    names = ("lorasure", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def write_manifest(run: Path) -> None:
    """sha256 and size of every file of the run, and the versions that wrote it. Written last."""
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.name != MANIFEST)
    listed = {p.relative_to(run).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size} for p in files}
    write_json(run / MANIFEST, {"files": listed, "versions": versions()})


def check_run(run: Path, *needed: str) -> None:
    """The folder is a run, and `needed` files are in it unchanged; else a DataError that says what to do."""
    if not (run / MANIFEST).is_file():
        raise DataError(f"{run}: not a run folder (no {MANIFEST}).")
    manifest = read_json(run / MANIFEST)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict):
        raise DataError(f"{run}: not a run folder (its {MANIFEST} is another program's).")
    for name in needed:
        if name not in listed or not (run / name).is_file():
            raise DataError(f"{run}: there is no {name} yet; run the stage before this one first.")
        if sha256(run / name) != listed[name].get("sha256"):
            raise DataError(f"{run}/{name}: the file was changed after it was written (its sha256 differs).")
