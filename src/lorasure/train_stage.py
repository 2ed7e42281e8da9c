"""Stage 3 on loaded data and model: what the loop needs, what it writes, and which state is handed over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from . import artifacts, lora, processes
from .calibrate import calibrate
from .checkpoint import Keeper, Utility, remove_checkpoints
from .config import AUTO, ForgetSettings, OptimizerSettings
from .data.examples import Example
from .data.load import examples_hash
from .data.pairing import sample
from .errors import DataError
from .fitting import training_budget
from .forward import base_of
from .layers import inner_layers
from .level import ROWS as LEVEL_ROWS
from .level import Level
from .objective import ForgetObjective, Objective, Unit, retain_penalty, retain_rows, run_steps
from .outcome import RATE
from .prefix import find_prefix
from .progress import Reporter
from .stages import Start, mean_nll, mean_probability, scored_rows, scores_from, update_summary
from .train import fit
from .workbench import Workbench

UTILITY_ROWS = 64  # retain rows that --min-utility is measured on


def train_adapter(
    bench: Workbench, run: Path, start: Start, watch: Callable[[lora.PeftModel], Utility | None] = lambda _: None
) -> lora.PeftModel:
    """Scores of the original model, then training -> trained.safetensors, train.jsonl; continues from a checkpoint.

    `watch`: given the model with its adapter, what is measured after every epoch where --min-utility does not say so.
    """
    s = replace(bench.settings, gradient_checkpointing=bench.checkpointing)
    summary = artifacts.read_json(run / artifacts.SUMMARY)
    objective = bench.objective()
    steps = run_steps(objective, s)
    used = retain_rows(steps)
    before = _observe(bench, objective, steps, start, summary.get("before"))
    prefix = {"prefix": objective.prefix.about()} if objective.prefix else {}
    aim = _aim(bench, summary.get("stop", {}))
    summary = update_summary(run, {"before": before} | aim | prefix)
    wrapped = attach_start(bench, start)
    watched = watch(wrapped)
    keeper = Keeper(run, s.checkpoint_every, bench.reporter.note, _utility(bench, wrapped, used) or watched)
    vocabulary = bench.model.config.get_text_config().vocab_size
    weights = {"retain": s.lambda_}
    keeper.level = _level(bench, wrapped, weights, summary)
    options = {
        "token_budget": training_budget(bench, objective.prefix),
        "term_weights": weights,
        "penalty": _penalty(wrapped, start),
        "ceilings": {"retain": s.max_retain_rise or math.log(vocabulary)},
        "on_guard": bench.fired,
    }
    if s.lr == AUTO:
        s = replace(s, lr=_calibrated(bench, run, wrapped, objective, s, len(steps), options))
    logged_fit(keeper, bench.reporter, wrapped, steps, objective, s, **options)
    trained = Start(lora.trained_factors(wrapped, start.factors), {})
    trained.check_finite()
    trained.save(run / artifacts.TRAINED)
    update_summary(run, _account(bench, keeper, used, summary))
    for name in (artifacts.LOG, artifacts.TRAINED):
        artifacts.finish(run, name)
    remove_checkpoints(run)
    return wrapped


def _calibrated(
    bench: Workbench,
    run: Path,
    wrapped: Any,
    objective: ForgetObjective,
    settings: ForgetSettings,
    steps: int,
    options: dict[str, Any],
) -> float:
    """The learning rate of `--lr auto`: that in the run's summary, or else found now and noted there."""
    summary = artifacts.read_json(run / artifacts.SUMMARY)
    if RATE not in summary:
        forget, began = bench.data[0].examples, time.perf_counter()
        known = lambda rows: _mean(bench, wrapped, [forget[i] for i in rows])  # noqa: E731
        with bench.reporter.stage("calibrate"):
            found = calibrate(wrapped, objective, settings, steps, known, **options)
        summary = update_summary(run, {RATE: found | {"seconds": time.perf_counter() - began}})
        bench.reporter.note(f"train: learning rate {found['rate']:.2g}, found in {found['steps']} steps (--lr auto).")
        if not found["half_forgotten"]:
            bench.reporter.note("train: little was forgotten in these steps, so the rate is a guess; --lr gives one.")
    with artifacts.as_written(run / artifacts.SUMMARY):
        return float(summary[RATE]["rate"])


def _observe(
    bench: Workbench, objective: ForgetObjective, steps: Sequence[list[Unit]], start: Start, known: Any
) -> dict[str, Any]:
    """Give the objective what it needs of the original model, whose scores are returned; `known`: them, or None.

    A continued run does it again: each row must share its batch with the same others, for the same rounding.
    """
    seen = [example for step in steps for unit in step for example in unit.sequences]
    used = retain_rows(steps)
    if len(set(seen)) < len(seen):  # else nothing comes twice
        options = {"note": bench.reporter.note, "compiled": bench.settings.compile}
        attempt = partial(find_prefix, bench.model, start.factors, seen, **options)
        objective.prefix = bench.within_memory(attempt, seen, "reference")
    if known and not any(objective.asked(used).values()):
        return known
    scored = scored_rows(bench)
    rows = {example for part in objective.asked(used, scored).values() for example in part}
    with bench.reporter.stage("reference", len(rows)) as progress:
        attempt = partial(objective.observe_original, bench.model, used, scored=scored, progress=progress)
        return scores_from(bench, bench.within_memory(attempt, list(rows), "reference"))


def logged_fit(
    keeper: Keeper,
    reporter: Reporter,
    model: Any,
    steps: Sequence[Any],
    objective: Objective,
    settings: OptimizerSettings,
    **options: Any,
) -> None:
    """`train.fit` with a progress bar, a log, and checkpoints."""
    if settings.compile and not inner_layers(base_of(model)):
        reporter.note("--compile: there is nothing to compile between the lowest layer that is trained and the last.")
    with reporter.stage("train", len(steps), "steps") as progress:
        fit(model, steps, objective, settings, **options, on_step=lambda _: progress(1), keeper=keeper)


def attach_start(bench: Workbench, start: Start) -> lora.PeftModel:
    """The base with the start's adapter, which computes what the base does."""
    s = bench.settings
    if other := set(start.layout().values()) - {s.rank}:
        raise DataError(f"{artifacts.START}: its factors have rank {min(other)}, the run's --rank is {s.rank}.")
    return lora.attach(bench.model, start.factors, s.rank, s.alpha, compensate=start.compensated)


def _penalty(wrapped: lora.PeftModel, start: Start) -> Any:
    if not start.bases:
        return None
    bases = {site: basis.to(wrapped.device) for site, basis in start.bases.items()}
    return lambda: retain_penalty([(lora.trainable_b(wrapped, site), basis) for site, basis in bases.items()])


def _utility(bench: Workbench, wrapped: Any, used: Collection[int]) -> Utility | None:
    """Mean probability of retain rows that training leaves out, or of any where it uses all. None: not asked for."""
    s = bench.settings
    if s.min_utility is None:
        return None
    forget, retain = (part.examples for part in bench.data)
    pool = [i for i in range(len(retain)) if i not in used] or list(range(len(retain)))
    rows = [retain[pool[i]] for i in sample(len(pool), min(len(pool), UTILITY_ROWS), s.seed + 2)]
    every, measured = math.ceil(len(forget) / s.batch_size), partial(_mean, bench, wrapped, rows)
    return Utility(measured, every, s.min_utility, rows_sha256=examples_hash(rows))


def _mean(bench: Workbench, wrapped: Any, rows: Sequence[Example]) -> float:
    """Mean probability of some rows, the same in all processes."""
    value = mean_probability(bench, wrapped, rows).value
    assert value is not None
    return processes.agreed(value)


def _aim(bench: Workbench, known: dict[str, Any]) -> dict[str, Any]:
    """For the summary: the level of --stop auto, unless the `known` one is of the same rows.

    Of the original model, so before the adapter is attached.
    """
    if bench.unseen is None or known.get("tokens_sha256") == bench.unseen.tokens_hash:
        return {}
    rows = bench.unseen.examples
    with bench.reporter.stage("level", len(rows)):
        level = mean_nll(bench, bench.model, rows)
    bench.reporter.note(
        f"level: {level:.2f} nats per token on {len(rows)} rows that the model never saw (--stop auto)."
    )
    return {"stop": {"level": level, "rows": len(rows), "tokens_sha256": bench.unseen.tokens_hash}}


def _level(bench: Workbench, wrapped: Any, weights: dict[str, float], summary: dict[str, Any]) -> Level | None:
    """When forgetting rests; None: never."""
    if bench.unseen is None:
        return None
    forget = bench.data[0].examples
    rows = [forget[i] for i in sample(len(forget), min(len(forget), LEVEL_ROWS), bench.settings.seed + 3)]
    return Level(lambda: mean_nll(bench, wrapped, rows), summary["stop"]["level"], weights)


def _account(bench: Workbench, keeper: Keeper, used: Collection[int], summary: dict[str, Any]) -> dict[str, Any]:
    """What the summary says of checkpoints and of --min-utility."""
    found: dict[str, Any] = {}
    if keeper.continued:
        found["resumed"] = [*summary.get("resumed", []), {"stage": "train", "step": keeper.continued}]
    if level := keeper.level:
        found["stop"] = {**summary["stop"], "seen": level.seen, "rests": level.rests}
    if utility := keeper.utility:
        left = len(bench.data[1].examples) - len(used)
        found["utility"] = {
            "floor": utility.floor,
            "rows": min(left or len(used), UTILITY_ROWS),
            "held_out": left > 0,
            "shares": utility.shares,
            "kept": bool(utility.best),
            "exported_step": utility.best or utility.shares[-1][0],
        }
    return found
