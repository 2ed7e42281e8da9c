"""Stage 3 on loaded data and model: what the loop needs, what it writes, and which state is handed over."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import artifacts, lora
from .checkpoint import Keeper, Utility, remove_checkpoints
from .data.pairing import sample
from .errors import DataError
from .objective import forget_steps, retain_penalty
from .progress import Reporter
from .stages import Start, mean_probability, score_sets, update_summary
from .train import fit
from .workbench import Workbench

UTILITY_ROWS = 64  # retain rows that --min-utility is measured on


def train_adapter(bench: Workbench, run: Path, start: Start) -> lora.PeftModel:
    """Scores of the original model, then training -> trained.safetensors, train.jsonl; continues from a checkpoint."""
    s = bench.settings
    summary = artifacts.read_json(run / artifacts.SUMMARY)
    if "before" not in summary:
        update_summary(run, {"before": score_sets(bench, bench.model)})
    objective = bench.objective()
    steps = list(forget_steps(objective, epochs=s.epochs, batch_size=s.batch_size, pairing=s.pairing, seed=s.seed))
    used = {unit.index for step in steps for unit in step if unit.term == "retain"}
    seen = [*objective.forget, *objective.refusals, *(objective.retain[i] for i in used)]
    bench.within_memory(partial(objective.observe_original, bench.model, used), seen, "reference")
    wrapped = attach_start(bench, start)
    keeper = Keeper(run, s.checkpoint_every, bench.reporter.note, _utility(bench, wrapped, used))
    vocabulary = bench.model.config.get_text_config().vocab_size
    options = {
        "token_budget": bench.token_budget,
        "term_weights": {"retain": s.lambda_},
        "penalty": _penalty(wrapped, start),
        "ceilings": {"retain": s.max_retain_rise or math.log(vocabulary)},
        "on_guard": bench.fired,
    }
    logged_fit(keeper, bench.reporter, wrapped, steps, objective, s, **options)
    trained = Start(lora.trained_factors(wrapped, start.factors), {})
    trained.check_finite()
    trained.save(run / artifacts.TRAINED)
    update_summary(run, _account(bench, keeper, used, summary))
    for name in (artifacts.LOG, artifacts.TRAINED):
        artifacts.finish(run, name)
    remove_checkpoints(run)
    return wrapped


def logged_fit(
    keeper: Keeper, reporter: Reporter, model: Any, steps: Sequence[Any], *args: Any, **options: Any
) -> None:
    """`train.fit` with a progress bar, a log, and checkpoints."""
    with reporter.stage("train", len(steps), "steps") as progress:
        fit(model, steps, *args, **options, on_step=lambda _: progress(1), keeper=keeper)


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

    def measure() -> float:
        value = mean_probability(bench, wrapped, rows).value
        assert value is not None
        return value

    return Utility(measure, math.ceil(len(forget) / s.batch_size), s.min_utility)


def _account(bench: Workbench, keeper: Keeper, used: Collection[int], summary: dict[str, Any]) -> dict[str, Any]:
    """What the summary says of checkpoints and of --min-utility."""
    found: dict[str, Any] = {}
    if keeper.continued:
        found["resumed"] = [*summary.get("resumed", []), {"stage": "train", "step": keeper.continued}]
    if utility := keeper.utility:
        left = len(bench.data[1].examples) - len(used)
        found["utility"] = {
            "floor": utility.floor,
            "rows": min(left or len(used), UTILITY_ROWS),
            "held_out": left > 0,
            "shares": utility.shares,
            "kept": bool(utility.good),
            "exported_step": utility.good[-1] if utility.good else utility.shares[-1][0],
        }
    return found
