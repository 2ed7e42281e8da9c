"""Task arithmetic (arXiv 2212.04089): learn the forget set with an adapter, then take what was learnt away."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .. import artifacts, lora
from ..checkpoint import Keeper, remove_checkpoints
from ..init.low_rank import Factors
from ..objective import learn, learn_steps
from ..stages import Start, export, make_start
from ..train_stage import attach_start, logged_fit
from ..workbench import Workbench
from .settings import TaskArithmeticSettings


def make(bench: Workbench, settings: TaskArithmeticSettings, run: Path) -> None:
    """Train on the NLL of the forget rows, multiply what the adapter adds by -factor, and export it like any other."""
    start = make_start(bench, run, None)
    export(bench, run, start, partial(_negated_model, bench, settings, run, start))
    artifacts.finish(run, artifacts.LOG)
    remove_checkpoints(run)


def _negated_model(bench: Workbench, settings: TaskArithmeticSettings, run: Path, start: Start) -> lora.PeftModel:
    wrapped = attach_start(bench, start)
    order = {"epochs": settings.epochs, "batch_size": settings.batch_size, "seed": settings.seed}
    steps = list(learn_steps(bench.data[0].examples, **order))
    keeper = Keeper(run, settings.checkpoint_every, bench.reporter.note)
    options = {"token_budget": bench.token_budget, "on_guard": bench.fired}
    logged_fit(keeper, bench.reporter, wrapped, steps, learn, settings, **options)
    lora.set_trained(wrapped, negated(lora.trained_factors(wrapped, start.factors), settings.factor))
    return wrapped


def negated(learnt: lora.Start, factor: float) -> lora.Start:
    """Factors of -factor times the product B A of each site."""
    return {site: Factors(-factor * f.B, f.A) for site, f in learnt.items()}
