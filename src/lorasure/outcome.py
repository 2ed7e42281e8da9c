"""What a run hands over: an adapter, an assistant whose logits are subtracted, or whole weights. Nothing heavy here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .artifacts import ADAPTER, MERGED, read_manifest
from .errors import DataError

ASSISTANT = "assistant"
ABOUT_ASSISTANT = "assistant.json"


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
