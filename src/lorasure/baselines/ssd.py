"""Selective Synaptic Dampening (arXiv 2308.07707): weights that matter to the forget set alone, made smaller."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import artifacts
from ..errors import UsageError
from ..importance.measure import measure
from ..importance.scores import SCORES
from ..models import load_model
from ..sites import set_weight, weight
from ..stages import update_summary
from ..workbench import Workbench
from .common import score
from .settings import SsdSettings


def dampened(
    matrix: Tensor, forget: Tensor, retain: Tensor, *, selection: float, dampening: float
) -> tuple[Tensor, int]:
    """(matrix with the chosen entries made smaller, their number). All (out, in); importances not negative.

    Entries with forget > selection * retain are multiplied by min(dampening * retain / forget, 1).
    """
    chosen = forget > selection * retain  # so forget is above 0 there, and nothing divides by 0
    shrunk = matrix * (dampening * retain / forget).clamp_max(1)
    return torch.where(chosen, shrunk, matrix), int(chosen.sum())


def make(bench: Workbench, settings: SsdSettings, run: Path) -> None:
    """Measure importance, dampen, and write the whole model to merged/: the change is of full rank, no adapter fits it.

    Importance is E[g^2] of per-example gradients (see importance/moments.py) on the linear layers of --targets;
    embeddings and norms stay as they are. The paper takes the whole training set for the retain set.
    """
    sets = bench.data[0].examples, bench.measured_retain
    with bench.reporter.stage("importance", sum(map(len, sets))) as progress:
        options = {"score": "fisher", "probe": bench.probe, "progress": progress}
        attempt = partial(measure, bench.model, bench.sites, *sets, **options)
        importance = bench.within_memory(attempt, [*sets[0], *sets[1]], "importance")
    second = SCORES["fisher"].function
    counts = {}
    for site in bench.sites:
        moments = (side[site.name]["W"].to(bench.device) for side in (importance.forget, importance.retain))
        forget, retain = map(second, moments)
        options = {"selection": settings.selection, "dampening": settings.dampening}
        changed, counts[site.name] = dampened(weight(bench.model, site), forget, retain, **options)
        set_weight(bench.model, site, changed)
    total = sum(counts.values())
    if not total:
        raise UsageError(f"--selection {settings.selection:g}: no weight is above it; choose a smaller one.")
    update_summary(run, {"dampened": {"weights": total, "of": sum(site.size for site in bench.sites)}})
    folder = run / artifacts.MERGED
    shutil.rmtree(folder, ignore_errors=True)
    bench.model.save_pretrained(folder)
    bench.tokenizer.save_pretrained(folder)
    bench.release_model()
    score(bench, run, load_model(str(folder), dtype=bench.dtype, device=bench.device))
