"""`lorasure plan`: what a run will need, memory by formula and time by trial, before it starts; `forget` asks too."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from . import lora
from .config import ForgetSettings
from .data.examples import Example, micro_batches
from .errors import ResourceError
from .footprint import Footprint, Part, Rows, Shapes, peak, without_weights
from .forward import answer_records
from .importance.activations import second_moments
from .importance.measure import measure
from .importance.paper_code import PASSES
from .importance.scores import choose_sites
from .init.apply import Evidence, initialise, plain
from .init.low_rank import Factors
from .model_files import locate
from .objective import Unit, forget_steps
from .prefix import ROOM, decoder_layers, find_prefix, lowest_layer
from .progress import Reporter
from .sites import Site
from .stages import scored_rows
from .train import fit
from .workbench import Workbench

TRIED = 4  # micro-batches, and steps, that time is taken of, after one that is not counted
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Bytes of every part of every stage, bytes free per place, bytes the process has, and seconds per stage."""

    parts: list[Part]
    free: dict[str, int]
    process: int
    tokens_per_batch: int
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
    fit_memory(bench)
    parts, room, own = footprint(bench).parts(), free_memory(bench.device), psutil.Process().memory_info().rss
    began = time.perf_counter()
    bench.prepare()
    prepared = {"prepare": time.perf_counter() - began}
    return Plan(parts, room, own, bench.token_budget, prepared | seconds(bench))


def footprint(bench: Workbench) -> Footprint:
    """What the memory of a run depends on, from its data and the model's configuration."""
    s, init = bench.settings, bench.init
    model = without_weights(locate(s.model, s.revision, s.allow_pickle))
    sites = bench.sites_of(model)
    shapes = Shapes.of(model, sites, bench.dtype)
    steps = list(_steps(bench))
    rows = [_rows(max(unit.sequences, key=len) for unit in step for _ in unit.sequences) for step in steps]
    measured = [*bench.data[0].examples, *bench.measured_retain]
    quantised = getattr(model.config, "quantization_config", None)
    four_bit = bool(s.quantize or (quantised and quantised.get("load_in_4bit")))
    found = Footprint(
        shapes,
        _rows(measured),
        rows,
        bench.token_budget,
        s.rank,
        1 if init.function is plain else 2,
        bench.probe,
        bench.measures_importance,
        init.evidence if init.evidence in ("outputs", "inputs") else "",
        s.coverage,
        s.gradient_checkpointing,
        four_bit,
        bench.device.type == "cpu",
        0,
    )
    if s.epochs > 1 and (s.coverage < 1 or lowest_layer(decoder_layers(model), model, sites)):
        tokens = sum(len(e) for e in {e for step in steps for unit in step for e in unit.sequences})
        return replace(found, kept=min(tokens * shapes.hidden * shapes.width, max(ROOM, found.weights)))
    return found


def _steps(bench: Workbench) -> Iterator[list[Unit]]:
    """The steps of one epoch."""
    s = bench.settings
    return forget_steps(bench.objective(), epochs=1, batch_size=s.batch_size, pairing=s.pairing, seed=s.seed)


def _rows(examples: Iterable[Example]) -> Rows:
    found = list(examples)
    return Rows([len(e) for e in found], [e.answer_length for e in found])


def free_memory(device: torch.device) -> dict[str, int]:
    """Bytes that are free now: of the `device` where that is a GPU, and of the `host`, in its control group if any."""
    room = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        room = min(room, int(text) - int(used.read_text()))
    found = {"host": room}
    if device.type == "cuda":
        found["device"] = torch.cuda.mem_get_info(device)[0]
    return found


def fit_memory(bench: Workbench) -> None:
    """Lower the tokens per pass where that is needed and the user did not set them; a ResourceError where nothing fits.

    From shapes alone: nothing is loaded and no pass is made.
    """
    needs, room = footprint(bench), free_memory(bench.device)
    if _fits(needs, room):
        return
    shortest = max(map(max, (needs.measured.lengths, *(rows.lengths for rows in needs.steps))))
    budget = bench.token_budget
    while bench.settings.tokens_per_batch is None and budget > shortest:
        budget = max(budget // 2, shortest)
        if _fits(replace(needs, token_budget=budget), room):
            bench.reporter.note(f"tokens per batch: {budget} instead of {bench.token_budget}, which would not fit")
            bench.token_budget = budget
            return
    raise ResourceError(_refusal(bench, needs, room, shortest))


def _fits(needs: Footprint, room: dict[str, int]) -> bool:
    parts = needs.parts()
    return all(peak(parts, place)[1] <= free for place, free in room.items())


def _refusal(bench: Workbench, needs: Footprint, room: dict[str, int], shortest: int) -> str:
    """What is needed, what is free, and which settings would do, or would help if none does alone."""
    parts = needs.parts()
    place, free = max(room.items(), key=lambda item: peak(parts, item[0])[1] - item[1])
    stage, needed = peak(parts, place)
    largest = sorted((p for p in parts if (p.stage, p.place) == (stage, place)), key=lambda p: -p.bytes)[:3]
    changes: dict[str, Footprint] = {
        f"--tokens-per-batch {shortest}": replace(needs, token_budget=shortest),
        "--gradient-checkpointing true": replace(needs, gradient_checkpointing=True),
        "--quantize nf4": replace(needs, four_bit=True),
        "--dtype bfloat16": replace(needs, shapes=replace(needs.shapes, width=2)),
        f"--rank {max(1, needs.rank // 4)}": replace(needs, rank=max(1, needs.rank // 4)),
        "--coverage 0.25": replace(needs, coverage=0.25),
        "--space lora": replace(needs, probe=replace(needs.probe, space="lora")),
    }
    after = {flag: peak(changed.parts(), place)[1] for flag, changed in changes.items()}
    helps = sorted((size, flag) for flag, size in after.items() if size < needed)
    enough = [(size, flag) for size, flag in helps if _fits(changes[flag], room)]
    told = ", ".join(f"{flag} ({size / GIB:.1f} GiB)" for size, flag in enough or helps)
    shown = ", ".join(f"{p.name} {p.bytes / GIB:.1f}" for p in largest)
    where = f"memory of {bench.device}" if place == "device" else "memory"
    return (
        f"--model {bench.settings.model}: {stage} needs {needed / GIB:.1f} GiB of {where} ({shown}), and "
        f"{free / GIB:.1f} GiB are free. "
        + (f"{'Any one of these would do' if enough else 'These help together'}: {told}." if told else "")
    )


def seconds(bench: Workbench) -> dict[str, float]:
    """Seconds per stage, in the order of a run: the median time per token of a few passes, times all tokens."""
    s = bench.settings
    measured = [*bench.data[0].examples, *bench.measured_retain]
    steps = list(_steps(bench))
    seen = [example for step in steps for unit in step for example in unit.sequences]
    with bench.reporter.stage("calibrate"):
        per_token, evidence, sites = _try_measuring(bench)
        init = _try_init(bench, sites, evidence)
        scoring, training = _try_training(bench, sites)
    measuring = per_token * sum(map(len, measured)) * (PASSES if s.compat else 1)
    return {
        "importance": measuring * bench.measures_importance,
        "init": init + measuring * (not bench.measures_importance),
        "reference": scoring * sum(map(len, {*scored_rows(bench), *seen})),
        "train": training * sum(map(len, seen)) * s.epochs,
        "export": bench.reporter.seconds["load model"],
        "evaluate": scoring * sum(map(len, scored_rows(bench))),
    }


class Clock:
    """Seconds per token of micro-batches, told by a stage's `progress` at the end of each."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

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
        return statistics.median(took / count for took, count in zip(spent, tokens[1:] or tokens, strict=True))


def _sample(rows: Sequence[Example], budget: int) -> list[Example]:
    """Rows of all lengths, enough for TRIED micro-batches and one to begin with."""
    by_length = sorted(rows, key=len)
    count = min(len(rows), math.ceil((TRIED + 1) * budget * len(rows) / sum(map(len, rows))))
    return [by_length[i * len(rows) // count] for i in range(count)]


def _try_measuring(bench: Workbench) -> tuple[float, Callable[[Site], Evidence], Sequence[Site]]:
    """Seconds per token of what the start is made from, that for a site, from the rows tried, and the sites chosen."""
    budget, clock = bench.token_budget, Clock()
    sets = [_sample(rows, budget) for rows in (bench.data[0].examples, bench.measured_retain)]
    options: dict[str, Any] = {"token_budget": budget, "progress": clock.tick}
    sites: Sequence[Site] = bench.sites
    evidence: Callable[[Site], Evidence] = lambda _: Evidence()  # noqa: E731
    if bench.measures_importance:
        found = measure(bench.model, sites, *sets, score=str(bench.score), probe=bench.probe, **options)
        evidence = lambda site: Evidence(found.weights(site, bench.device))  # noqa: E731
        names = choose_sites({site.name: evidence(site).weights.mean for site in sites}, bench.settings.coverage)
        sites = [site for site in sites if site.name in set(names)]
        return clock.per_token(budget, *sets), evidence, sites
    if bench.init.evidence == "none":
        return 0.0, evidence, sites
    of_inputs = bench.init.evidence == "inputs"
    forget, retain = (second_moments(bench.model, sites, rows, of_inputs=of_inputs, **options) for rows in sets)
    evidence = lambda site: Evidence(forget=forget[site.name], retain=retain[site.name])  # noqa: E731
    return clock.per_token(budget, *sets), evidence, sites


def _try_init(bench: Workbench, sites: Sequence[Site], evidence: Callable[[Site], Evidence]) -> float:
    """Seconds of all sites, from one of each shape."""
    total = 0.0
    for shape, count in Counter(site.shape for site in sites).items():
        one = next(site for site in sites if site.shape == shape)
        began = time.perf_counter()
        initialise(bench.model, [one], bench.init, evidence, replace(bench.request, paper_code=False), None)
        total += count * (time.perf_counter() - began)
    return total


def _try_training(bench: Workbench, sites: Sequence[Site]) -> tuple[float, float]:
    """Seconds per token of scoring rows and of training, on the model as it will be trained."""
    s, whole = bench.settings, bench.objective()
    rows, budget, clock = _sample(whole.forget, bench.token_budget), bench.token_budget, Clock()
    answer_records(bench.model, rows, budget, clock.tick)
    count = min(len(whole.forget), (TRIED + 1) * s.batch_size)
    objective = replace(whole, forget=whole.forget[:count], refusals=whole.refusals[:count])
    steps = list(forget_steps(objective, epochs=1, batch_size=s.batch_size, pairing=s.pairing, seed=s.seed))
    seen = [example for step in steps for unit in step for example in unit.sequences]
    if s.epochs > 1:
        objective.prefix = find_prefix(bench.model, sites, seen, budget, bench.reporter.note)
    objective.observe_original(bench.model, {u.index for step in steps for u in step if u.term == "retain"}, budget)
    factors = {site: Factors(torch.zeros(site.shape[0], s.rank), torch.zeros(s.rank, site.shape[1])) for site in sites}
    wrapped = lora.attach(bench.model, factors, s.rank, s.alpha, compensate=bench.init.function is not plain)
    records: list[dict[str, Any]] = []
    still = replace(s, lr=1e-12, max_grad_growth=1e12)
    fit(wrapped, steps, objective, still, token_budget=budget, on_step=records.append)
    return clock.per_token(budget, rows), statistics.median(r["seconds"] / r["tokens"] for r in records[1:] or records)
