"""The methods that forgetting is compared with: a row each, and the command that runs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .. import artifacts, folders
from ..config import ForgetSettings, OutSettings
from ..identity import allowed_changes, identity
from ..pipeline import Result, write_inputs
from ..progress import Reporter
from ..registry import lookup
from ..stages import update_summary
from ..workbench import Workbench
from . import ssd, task_arithmetic, uld
from .common import probabilities


@dataclass(frozen=True)
class Baseline:
    """A row of BASELINES. `make(bench, settings, run)` writes what is handed over, and its scores.

    `fixed`: settings of `lorasure forget` that it does not ask for. `known`, `harmed`: what to try when the forget set
    is still known, or the retain set suffered.
    """

    title: str
    paper: str
    make: Callable[[Workbench, Any, Path], None]
    fixed: Mapping[str, Any]
    known: str
    harmed: str


BASELINES = {
    "ssd": Baseline(
        "Selective Synaptic Dampening: weights that matter to the forget set alone made smaller, no training",
        "https://arxiv.org/abs/2308.07707",
        ssd.make,
        # Rank 1 fits every layer; merge, because whole weights are what it makes.
        {"init": "fila", "score": "fisher", "space": "full", "rank": 1, "merge": True},
        "a smaller --selection, then a smaller --dampening",
        "a larger --selection, then a --dampening nearer to 1",
    ),
    "task-arithmetic": Baseline(
        "task arithmetic: an adapter trained on the forget set, negated",
        "https://arxiv.org/abs/2212.04089",
        task_arithmetic.make,
        {"init": "lora"},
        "a larger --factor, then a higher --lr",
        "a smaller --factor",
    ),
    "uld": Baseline(
        "ULD: the logits of an assistant that knows the forget set only, subtracted",
        "https://arxiv.org/abs/2406.08607",
        uld.make,
        {"init": "lora"},
        "a larger --weight, then more --epochs or a higher --lr",
        "a smaller --weight, or a larger --lambda",
    ),
}


def run_baseline(name: str, settings: OutSettings, reporter: Reporter | None = None) -> Result:
    """Run a method of BASELINES on its settings; a run folder like that of `forget`, scores before and after in it.

    What is in it to use: `adapter/` (task-arithmetic), `merged/` (ssd), `assistant/` (uld). Raises as `forget` does.
    """
    row = lookup(BASELINES, name, "baseline")
    out = Path(settings.out)
    folders.check_new(out, settings.overwrite, settings.resume, folders.read_by(settings), artifacts.SUMMARY)
    bench = Workbench(_shared(settings, row.fixed), reporter)
    bench.prepare()
    own = identity(settings, dict(zip(("forget", "retain"), bench.data, strict=True)), bench.fingerprint)
    options = {"resume": settings.resume, "overwrite": settings.overwrite, "note": bench.reporter.note}
    with folders.resumable_folder(out, own, allow_change=allowed_changes(settings), **options) as run:
        write_inputs(bench, run, settings)
        method = {"title": row.title, "paper": row.paper, "known": row.known, "harmed": row.harmed}
        update_summary(run, {"method": method, "before": probabilities(bench, bench.model)})
        row.make(bench, settings, run)
        return Result(out, artifacts.read_json(run / artifacts.SUMMARY))


def _shared(settings: OutSettings, fixed: Mapping[str, Any]) -> ForgetSettings:
    """What both have, for the workbench."""
    shared = {f.name: getattr(settings, f.name) for f in fields(ForgetSettings) if hasattr(settings, f.name)}
    return ForgetSettings(**shared | dict(fixed))
