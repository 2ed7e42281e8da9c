"""`lorasure plan`: what a run will need, memory by formula and time by trial, before it starts; `forget` asks too."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import psutil
import torch

from . import lora
from .calibrate import forget_ramp
from .config import AUTO, ForgetSettings
from .data.examples import Example, micro_batches
from .fitting import fit_memory, footprint, free_memory, training_budget
from .footprint import Part, peak
from .forward import answer_records
from .importance.activations import InGroups, room_on, second_moments
from .importance.measure import measure
from .importance.paper_code import PASSES
from .importance.scores import choose_sites
from .init.apply import Evidence, initialise, of_moments
from .init.low_rank import Factors
from .layers import checkpointed
from .objective import ForgetSteps, retain_rows, run_steps
from .prefix import Prefix, find_prefix
from .progress import Reporter
from .sites import Site
from .stages import scored_rows
from .train import fit
from .workbench import Workbench

TRIED = 4  # micro-batches, and steps, that time is taken of, after one that is not counted


@dataclass(frozen=True)
class Plan:
    """Bytes of every part of every stage, bytes free per place, bytes the process has, and seconds per stage.

    `tokens_per_batch` and `gradient_checkpointing`: as the run would take them.
    """

    parts: list[Part]
    free: dict[str, int]
    process: int
    tokens_per_batch: int
    gradient_checkpointing: bool
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """All of it, with the peak of each place."""
        places = {place: dict(zip(("stage", "bytes"), peak(self.parts, place), strict=True)) for place in self.free}
        return asdict(self) | {"peak": places, "total_seconds": sum(self.seconds.values())}


def plan(settings: ForgetSettings, reporter: Reporter | None = None) -> Plan:
    """What `forget` with these settings will need. Reads the data, loads the model, tries a few passes; writes nothing.

    Raises what `forget` raises before its start.
    """
    bench = Workbench(settings, reporter)
    began = time.perf_counter()
    with bench.reporter.held():
        fit_memory(bench)
        parts, room, own = footprint(bench).parts(), free_memory(bench.device), psutil.Process().memory_info().rss
        bench.prepare()
    prepared = {"prepare": time.perf_counter() - began}
    return Plan(parts, room, own, bench.token_budget, bench.checkpointing, prepared | seconds(bench))


def seconds(bench: Workbench) -> dict[str, float]:
    """Seconds per stage, in the order of a run: the median time per token of a few passes, times all tokens."""
    s = bench.settings
    measured = [*bench.data[0].examples, *bench.measured_retain]
    objective = bench.objective()
    steps = run_steps(objective, s)
    seen = [example for step in steps for unit in step for example in unit.sequences]
    ramp = sum(len(e) for step in forget_ramp(objective, s) for unit in step for e in unit.sequences)
    with bench.reporter.stage("calibrate"):
        per_token, evidence, sites = _try_measuring(bench)
        init = _try_init(bench, sites, evidence)
        del evidence  # second moments, which may take a quarter of a GPU
        scoring, training, objective.prefix = _try_training(bench, sites)
    if objective.prefix:
        objective.prefix.rows = dict.fromkeys(seen)
    asked = objective.asked(retain_rows(steps), scored_rows(bench)).values()
    measuring = per_token * sum(map(len, measured)) * (PASSES if s.compat else 1)
    return {
        "importance": measuring * bench.measures_importance,
        "init": init + measuring * (not bench.measures_importance),
        "reference": scoring * sum(map(len, set().union(*asked))),
        "calibrate": training * ramp * (s.lr == AUTO),
        "train": training * sum(map(len, seen)),
        "export": bench.reporter.seconds["load model"],
        "evaluate": scoring * sum(map(len, scored_rows(bench))),
    }


class Clock:
    """Seconds per token of micro-batches, told by a stage's `progress` at the end of each."""

    def __init__(self) -> None:
        self.stamps = [time.perf_counter()]

    def tick(self, _: int = 0) -> None:
        """A micro-batch is done, on the device as well."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.stamps.append(time.perf_counter())

    def per_token(self, budget: int, *sets: Sequence[Example]) -> float:
        """The median over the micro-batches of these sets, the first of all left out."""
        tokens = [
            sum(len(rows[i]) for i in group) for rows in sets for group in micro_batches([*map(len, rows)], budget)
        ]
        spent = [after - before for before, after in pairwise(self.stamps)]
        rates = [took / count for took, count in zip(spent, tokens, strict=True)]
        return statistics.median(rates[1:] or rates)


def _sample(rows: Sequence[Example], budget: int) -> list[Example]:
    """Rows of all lengths, enough for TRIED micro-batches and one to begin with."""
    by_length = sorted(rows, key=len)
    count = min(len(rows), math.ceil((TRIED + 1) * budget * len(rows) / sum(map(len, rows))))
    return [by_length[i * len(rows) // count] for i in range(count)]


def _try_measuring(bench: Workbench) -> tuple[float, Callable[[Site], Evidence], Sequence[Site]]:
    """Seconds per token of what the start is made from, that for a site, from the rows tried, and the sites chosen."""
    s, budget, clock, rate = bench.settings, bench.token_budget, Clock(), 0.0
    sets = [_sample(rows, budget) for rows in (bench.data[0].examples, bench.measured_retain)]
    sites: Sequence[Site] = bench.sites
    evidence: Callable[[Site], Evidence] = lambda _: Evidence()  # noqa: E731
    if bench.measures_importance:
        options: dict[str, Any] = {"token_budget": budget, "progress": clock.tick}
        with checkpointed(bench.model, bench.checkpointing):
            found = measure(bench.model, sites, *sets, score=str(bench.score), probe=bench.probe, **options)
        rate += clock.per_token(budget, *sets)
        evidence = lambda site: Evidence(found.weights(site, bench.device))  # noqa: E731
        names = choose_sites({site.name: found.weights(site, bench.device).mean for site in sites}, s.coverage)
        sites = [site for site in sites if site.name in set(names)]
    if bench.init.evidence in ("outputs", "inputs"):
        clock = Clock()
        options = {"token_budget": budget, "progress": clock.tick, "of_inputs": bench.init.evidence == "inputs"}
        both = lambda some: [second_moments(bench.model, some, rows, **options) for rows in sets]  # noqa: E731
        directions = InGroups(sites, bench.init.evidence, both, room_on(bench.device))
        directions(sites[0])
        rate += clock.per_token(budget, *sets) * len(directions.groups)
        evidence = of_moments(directions)
    return rate, evidence, sites


def _try_init(bench: Workbench, sites: Sequence[Site], evidence: Callable[[Site], Evidence]) -> float:
    """Seconds of all sites, from one of each shape: too many where layers share their directions."""
    total = 0.0
    for shape, count in Counter(site.shape for site in sites).items():
        one = next(site for site in sites if site.shape == shape)
        began = time.perf_counter()
        initialise(bench.model, [one], bench.init, evidence, replace(bench.request, paper_code=False), None)
        total += count * (time.perf_counter() - began)
    return total


def _try_training(bench: Workbench, sites: Sequence[Site]) -> tuple[float, float, Prefix | None]:
    """Seconds per token of scoring rows and of training, on the model as it will be trained, with the prefix if any."""
    s, whole = replace(bench.settings, gradient_checkpointing=bench.checkpointing), bench.objective()
    budget = bench.token_budget
    rows, clock = _sample(whole.forget, budget), Clock()
    answer_records(bench.model, rows, budget, clock.tick)
    count = min(len(whole.forget), (TRIED + 1) * s.batch_size)
    objective = replace(whole, forget=whole.forget[:count], refusals=whole.refusals[:count])
    steps = ForgetSteps(objective, epochs=1, batch_size=s.batch_size, pairing=s.pairing, seed=s.seed)
    seen = [example for step in steps for unit in step for example in unit.sequences]
    if s.epochs > 1:
        objective.prefix = find_prefix(bench.model, sites, seen, budget, bench.reporter.note, compiled=s.compile)
    objective.observe_original(bench.model, retain_rows(steps), budget)
    factors = {site: Factors(torch.zeros(site.shape[0], s.rank), torch.zeros(s.rank, site.shape[1])) for site in sites}
    wrapped = lora.attach(bench.model, factors, s.rank, s.alpha, compensate=bench.init.compensated)
    records: list[dict[str, Any]] = []
    still = replace(s, lr=1e-12, max_grad_growth=1e12)
    passes = training_budget(bench, objective.prefix)
    fit(wrapped, steps, objective, still, token_budget=passes, on_step=records.append)
    stepping = statistics.median(r["seconds"] / r["tokens"] for r in records[1:] or records)
    return clock.per_token(budget, rows), stepping, objective.prefix
