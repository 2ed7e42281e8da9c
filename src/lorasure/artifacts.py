"""Files of a run: the only module that knows their formats. safetensors and JSON, written whole or not at all.

A run folder is built under a hidden name beside its final place and renamed when its manifest is in it. A stage that adds to
a finished run writes each file beside its final name and renames it, manifest last. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .errors import DataError, UsageError

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
    """Refuse an output folder that holds anything, unless the user said to replace it."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: this is a file, a folder is wanted.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"--out {out}: the folder is not empty. Choose another one, or add --overwrite true.")


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A private folder that takes the name `out` only if the block ends without an error; else nothing is left."""
    check_new(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    try:
        yield partial
        write_manifest(partial)
        if out.is_dir():
            shutil.rmtree(out)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
    with _beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys; NaN and infinity are refused, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_yaml(path: Path, value: Any) -> None:
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a readable JSON file ({type(error).__name__}).") from error


def read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not a readable YAML file ({type(error).__name__}).") from error


def write_tensors(path: Path, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Tensors as safetensors; `about` (units, normalisation, counts, hashes) goes into the header as JSON."""
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
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
    """The folder is a run, and `needed` files are in it unchanged; else a DataError that says which stage makes them."""
    if not (run / MANIFEST).is_file():
        raise DataError(f"{run}: not a run folder (no {MANIFEST}).")
    listed = read_json(run / MANIFEST)["files"]
    for name in needed:
        if name not in listed or not (run / name).is_file():
            raise DataError(f"{run}: there is no {name} yet; run the stage before this one first.")
        if sha256(run / name) != listed[name]["sha256"]:
            raise DataError(f"{run}/{name}: the file was changed after it was written (its sha256 differs).")
