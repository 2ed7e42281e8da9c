"""What a run found and hands over: its learning rate, an adapter, an assistant or whole weights. Nothing heavy here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .artifacts import ADAPTER, MERGED, read_manifest
from .config import AUTO
from .errors import DataError

ASSISTANT = "assistant"
ABOUT_ASSISTANT = "assistant.json"
RATE = "learning_rate"  # in summary.json, where --lr auto has found one


def learning_rate(summary: Mapping[str, Any]) -> float:
    """Of a run by its summary: the one given, which may have replaced what auto had found."""
    given = summary["settings"]["lr"]
    return summary[RATE]["rate"] if given == AUTO else given


def adapter_form(export: Mapping[str, Any]) -> str:
    """What kind of adapter a run's `export` record says was handed over."""
    scale = export.get("scale", 1.0)  # not there in runs of before
    kept = export.get("kept_energy")
    compressed = f" with {kept:.1%} of the energy" if kept is not None else ""
    return f"rank {export['rank']}{compressed}" + (f", {scale:g} times what was trained" if scale != 1 else "")


def weights_of(files: Iterable[str]) -> str | None:
    """Of a run's files, the (first) one with the weights that it hands over; None if there is none yet."""
    names = sorted(name for name in files if name.endswith(".safetensors"))
    return next((n for kind in (ADAPTER, ASSISTANT, MERGED) for n in names if n.startswith(f"{kind}/")), None)


def change_files(run: Path) -> list[str]:
    """The files of what a run hands over, that with the weights first. DataError if it has got nothing to."""
    files = read_manifest(run)
    weights = weights_of(files)
    if weights is None:
        raise DataError(f"{run}: it holds neither an adapter nor a model; was it finished?")
    folder = weights.split("/")[0]
    return [weights, *sorted(name for name in files if name.startswith(f"{folder}/") and name != weights)]
