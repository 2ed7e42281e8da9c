"""Whether a run fits into memory, from shapes of the model and lengths of the rows, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from . import processes
from .data.examples import Example
from .errors import ResourceError
from .footprint import Footprint, Rows, Shapes, peak
from .importance.activations import room_on
from .layers import decoder_layers
from .memory import free_on
from .models import load_shapes
from .objective import retain_rows, run_steps
from .prefix import ROOM, Prefix, constant_attention, keeps_attention, lowest_layer, tokens_per_pass
from .workbench import Workbench

GIB = 2**30
CONTAINER = Path("/sys/fs/cgroup")


def footprint(bench: Workbench) -> Footprint:
    """What the memory of a run depends on, from its data and the model's configuration."""
    s, init = bench.settings, bench.init
    model = load_shapes(s.model, s.revision, s.allow_pickle)
    sites = bench.sites_of(model)
    shapes = Shapes.of(model, sites, bench.dtype)
    objective = bench.objective(bigrams=False)
    steps = run_steps(objective, s)  # of all epochs: in each other retain rows may be met
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
        2 if init.compensated else 1,
        bench.probe,
        bench.measures_importance,
        init.evidence if init.evidence in ("outputs", "inputs") else "",
        s.coverage,
        bench.checkpointing,
        s.compile,
        four_bit,
        bench.device.type == "cpu",
        processes.size() if processes.sharded() else 1,
        skipped=0,
        kept=0,
        room=0,
    )
    kept, skipped = 0, 0.0
    layers, chosen = decoder_layers(model), s.coverage < 1  # then it is not known yet which sites
    first = lowest_layer(layers, model, sites)
    if s.epochs > 1 and (chosen or first):
        skipped = 0.0 if chosen or not _refills(bench) else first / len(layers)
        tokens = sum(map(len, {e for step in steps for unit in step for e in unit.sequences}))
        states = tokens * shapes.hidden * shapes.width
        both = keeps_attention(bench.device, s.compile) and (chosen or constant_attention(layers[first], model, sites))
        kept += next((n * states for n in ([2, 1] if both else [1]) if n * states <= max(ROOM, found.weights)), 0)
    if objective.uses_original_states:
        kept += sum(objective.retain[i].answer_length for i in retain_rows(steps)) * shapes.hidden * shapes.width
    return replace(found, skipped=skipped, kept=kept, room=room_on(bench.device, found.weights))


def training_budget(bench: Workbench, prefix: Prefix | None) -> int:
    """Padded tokens per pass of training: where layers are skipped, as many as take the memory of a whole pass."""
    if prefix is None or not _refills(bench):
        return bench.token_budget
    return tokens_per_pass(bench.token_budget, prefix.skipped)


def _refills(bench: Workbench) -> bool:
    """Whether training's passes grow where layers are skipped: on a CPU, unless the user said how large they are.

    A GPU is busy with 8192 tokens in one layer. Several processes take passes in turn, so few large ones would leave
    some idle.
    """
    return not bench.settings.tokens_per_batch and bench.device.type == "cpu" and processes.size() == 1


def _rows(examples: Iterable[Example]) -> Rows:
    found = list(examples)
    return Rows([len(e) for e in found], [e.answer_length for e in found])


def free_memory(device: torch.device) -> dict[str, int]:
    """Bytes that are free now: of the `device` where that is a GPU, and of the `host` (or container)."""
    room, limit = psutil.virtual_memory().available, CONTAINER / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        room = min(room, int(text) - _taken(CONTAINER))
    found = {"host": room}
    if device.type == "cuda":
        found["device"] = free_on(device)
    return found


def _taken(container: Path) -> int:
    """Bytes that its processes have, without copies of files, which go where room is wanted."""
    about = dict(line.split() for line in (container / "memory.stat").read_text().splitlines())
    files = int(about["active_file"]) + int(about["inactive_file"])
    return int((container / "memory.current").read_text()) - files


def fit_memory(bench: Workbench, *stages: str) -> None:
    """Lower the tokens per pass where that is needed and the user did not set them; a ResourceError where nothing fits.

    On a GPU, where the user left that open too, rather recompute activations: large passes that do are faster there
    than small ones that don't. From shapes alone: nothing is loaded and no pass is made. Several processes take what
    fits in each of them, as they deal out the same passes. `stages`: those that are to be run, all if none is named.
    """
    needs, room = replace(footprint(bench), stages=stages), free_memory(bench.device)
    shortest = max(map(max, (needs.measured.lengths, *(rows.lengths for rows in needs.steps))))
    own = _fitting(bench, needs, room, shortest)
    budget = processes.least(own)
    if budget < bench.token_budget and _may_checkpoint(bench, needs):
        saving = replace(needs, gradient_checkpointing=True)
        own_saving = _fitting(bench, saving, room, shortest)
        if (larger := processes.least(own_saving)) > budget:
            bench.reporter.note("gradient checkpointing: on, as large passes would not fit without")
            needs, own, budget, bench.checkpointing = saving, own_saving, larger, True
    if not own:
        raise ResourceError(_refusal(bench, needs, room, shortest))
    if not budget:
        raise ResourceError(f"--model {bench.settings.model}: another of the processes has too little memory.")
    if budget < bench.token_budget:
        bench.reporter.note(f"tokens per batch: {budget} instead of {bench.token_budget}, which would not fit")
        bench.token_budget = budget


def _may_checkpoint(bench: Workbench, needs: Footprint) -> bool:
    s = bench.settings
    left_open = s.gradient_checkpointing is None and not s.compile
    return left_open and bench.device.type == "cuda" and needs.shapes.recomputed


def _fitting(bench: Workbench, needs: Footprint, room: dict[str, int], shortest: int) -> int:
    """Tokens per pass that fit here, those wanted at the most; 0 if none do."""
    budget = bench.token_budget
    while not _fits(replace(needs, token_budget=budget), room):
        if bench.settings.tokens_per_batch or budget <= shortest:
            return 0
        budget = max(budget // 2, shortest)
    return budget


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
