"""Files of a run: the only module that knows their formats. safetensors and JSON, written whole or not at all.

Each file is written under a hidden name, synced and renamed. No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import DataError, LorasureError

MANIFEST = "manifest.json"
IDENTITY = "identity.json"
CONFIG = "config.yaml"
DATA = "data.json"
IMPORTANCE = "importance.safetensors"
START = "init.safetensors"
TRAINED = "trained.safetensors"
LOG = "train.jsonl"
SUMMARY = "summary.json"
FINETUNED = "finetune.json"
ATTACK = "attack.json"
ATTACKS = "attacks.jsonl"
ADAPTER = "adapter"
MERGED = "merged"

_UNFINISHED = re.compile(r"\..*\.partial-\d+")


def exists(path: Path) -> bool:
    """Whether something of this name is there; a name that no file can have (too long, with a NUL) is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def sync(path: Path) -> None:
    """Put a file's content, or a folder's list of names, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_unfinished(path: Path) -> bool:
    """Whether this is, or is in, something that was being written when its process ended."""
    return any(_UNFINISHED.fullmatch(part) for part in path.parts)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process was in the middle of writing."""
    for path in [p for p in folder.rglob(".*.partial-*") if _UNFINISHED.fullmatch(p.name)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it was in a folder that has just gone


def _unfinished(path: Path) -> Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, synced and renamed to `path` when the block ends without an error."""
    partial = _unfinished(path)
    try:
        yield partial
        partial.chmod(0o600)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def sealed_folder(path: Path) -> Iterator[Path]:
    """A folder with its own manifest, there whole or not at all. There must be none of that name."""
    partial = _unfinished(path)
    partial.mkdir(mode=0o700)
    try:
        yield partial
        write_manifest(partial)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(path.parent)


@contextmanager
def disk_errors() -> Iterator[None]:
    """A disk that fails inside safetensors raises its own class, with the number in the text: make that an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """A file, whole or not at all."""
    with _beside(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys; NaN and infinity are refused, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds; a DataError if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable JSON file ({type(error).__name__}).") from error


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
    """(tensors, about) of a file written by `write_tensors`.

    Copies in memory of their own: products of tensors that lie in the file's own memory, not aligned, round otherwise.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = dict(json.loads((file.metadata() or {})["lorasure"]))
            return {name: file.get_tensor(name).clone() for name in file.keys()}, about  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a file that this program wrote ({type(error).__name__}).") from error


def read_about(path: Path) -> dict[str, Any]:
    """The `about` of a file written by `write_tensors`, without its tensors and without torch."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {})["lorasure"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a file that this program wrote ({type(error).__name__}).") from error


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Within the block, content that does not fit is a DataError: the file is another program's or was altered."""
    try:
        yield
    except LorasureError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not what this program writes there ({type(error).__name__}).") from error


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


def copy_files(run: Path, into: Path, names: Iterable[str]) -> None:
    """Second names for files of a run (or copies, where a file system has no links). They never change in place."""
    for name in names:
        source, target = run / name, into / name
        if source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)


def write_manifest(folder: Path) -> None:
    """sha256 and size of every file of the folder, and the versions that wrote it. Written last."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    listed = {p.relative_to(folder).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size} for p in files}
    write_json(folder / MANIFEST, {"files": listed, "versions": versions()})


def begin(folder: Path) -> None:
    """A manifest that lists nothing: the folder is this program's, and there is more to come."""
    write_json(folder / MANIFEST, {"files": {}, "versions": versions()})


def finish(folder: Path, name: str) -> None:
    """List a file of an unfinished folder in its manifest: whoever resumes there need not make it again."""
    listed = read_json(folder / MANIFEST)["files"] if (folder / MANIFEST).is_file() else {}
    listed[name] = {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
    write_json(folder / MANIFEST, {"files": listed, "versions": versions()})


def read_manifest(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the files of a folder; a DataError if its manifest is not one of ours."""
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: not a run folder (no {MANIFEST}).")
    manifest = read_json(folder / MANIFEST)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict):
        raise DataError(f"{folder}: not a run folder (its {MANIFEST} is another program's).")
    for name, about in listed.items():
        if not (_is_inside(folder, name) and isinstance(about, dict) and isinstance(about.get("sha256"), str)):
            raise DataError(f"{folder}/{MANIFEST}: the entry {name!r} is not one of ours.")
    return {name: about["sha256"] for name, about in listed.items()}


def is_sealed(folder: Path) -> bool:
    """Whether a manifest of ours lists files here: what is added, or changed, no longer is as it was written."""
    with suppress(DataError):
        return bool(read_manifest(folder))
    return False


def _is_inside(folder: Path, name: str) -> bool:
    """Whether this can only be a file of the folder: no absolute path, no `..`, no link that leads out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return False
    try:
        return Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # a NUL or half a surrogate pair: no file has such a name
        return False


def check_run(run: Path, *needed: str) -> None:
    """The folder is a run, and `needed` files are in it unchanged; else a DataError that says what to do."""
    listed = read_manifest(run)
    for name in needed:
        if name not in listed or not (run / name).is_file():
            why = "its stage has not been run, it was purged, or another command made this folder"
            raise DataError(f"{run}: there is no {name}: {why}.")
        if sha256(run / name) != listed[name]:
            raise DataError(f"{run}/{name}: the file was changed after it was written (its sha256 differs).")


def differences(folder: Path) -> list[str]:
    """Every file that is missing, changed or not in the manifest: "NAME missing", "NAME changed", "NAME extra"."""
    listed = read_manifest(folder)
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} - {MANIFEST}
    found = dict.fromkeys(listed.keys() - there, "missing") | dict.fromkeys(there - listed.keys(), "extra")
    found |= {name: "changed" for name in listed.keys() & there if sha256(folder / name) != listed[name]}
    return [f"{name} {what}" for name, what in sorted(found.items())]
