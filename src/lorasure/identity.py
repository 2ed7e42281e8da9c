"""What a run depends on, which must be the same when it is continued, and what --allow-change may change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import artifacts
from .config import PER_CALL, ImportanceSettings, InitSettings, OutSettings, TrainSettings
from .data.load import DataSet
from .errors import UsageError
from .models import dtype_name, pick_device, pick_dtype

ANY_TIME = PER_CALL | {"device", "tokens_per_batch"}  # settings that no result depends on
SETTLED = {  # by these files
    artifacts.IMPORTANCE: (ImportanceSettings,),
    artifacts.START: (ImportanceSettings, InitSettings),
    artifacts.TRAINED: (ImportanceSettings, InitSettings, TrainSettings),
}


def identity(settings: OutSettings, data: Mapping[str, DataSet], base: Mapping[str, Any]) -> dict[str, Any]:
    """All that a result depends on, flat, under the names that --allow-change takes: for `folders.resumable_folder`.

    Paths are left out: hashes of each set of `data` and of the files of the `base` (its fingerprint) say what is in
    them, under names that no setting has. Of a library's version, the major number, or 0.minor; of --dtype auto, what
    it is here.
    """
    paths = {f.name for f in fields(settings) if f.metadata.get("path")}
    own = {name: value for name, value in settings.to_dict().items() if name not in PER_CALL | paths}
    own["dtype"] = dtype_name(pick_dtype(own["dtype"], pick_device(own["device"])))
    text = {f"{name}_text": part.text_hash for name, part in data.items()}
    tokens = {f"{name}_tokens": part.tokens_hash for name, part in data.items()}
    weights = hashlib.sha256(json.dumps(base["files"], sort_keys=True).encode()).hexdigest()
    versions = {f"{name}_version": _major(version) for name, version in artifacts.versions().items()}
    return own | text | tokens | {"weights": weights, "model_config": base["config"]} | versions


def _major(version: str) -> str:
    return ".".join(version.split(".")[: 1 + version.startswith("0.")])


def allowed_changes(settings: OutSettings) -> list[str]:
    """The names in --allow-change, as flags or as settings."""
    return [name for part in settings.allow_change.split(",") if (name := part.strip().lstrip("-").replace("-", "_"))]


def of_scores(key: str) -> bool:
    """Whether the scores of before and after depend on what a name of an identity stands for."""
    return key.endswith(("_text", "_tokens")) or key in ("weights", "model_config", "quantize", "dtype", "seed")


def check_unsettled(partial: Path, allowed: Sequence[str]) -> None:
    """What a finished stage was made with cannot change any more: it would be ignored, or not fit."""
    for name, stages in SETTLED.items():
        settled = {f.name.rstrip("_") for stage in stages for f in fields(stage)} - ANY_TIME
        if name == artifacts.TRAINED:  # the scores of before are there
            settled |= set(filter(of_scores, allowed))
        if (partial / name).is_file() and (late := [key for key in allowed if key in settled]):
            raise UsageError(
                f"--allow-change {late[0]}: settled by {name}, which is finished; start anew to change it."
            )
