"""One measurement in a process of its own, by a JSON description: `worker.py '{"job": "memory", ...}'`; prints JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent


def in_process(spec: dict[str, Any]) -> dict[str, Any]:
    """Run `spec` in a fresh process. `total_seconds`: of the whole process, by the same clock as in it."""
    command = [sys.executable, str(HERE / "worker.py"), json.dumps(spec)]
    return measured(command, spec["threads"])


def measured(command: list[str], threads: int) -> dict[str, Any]:
    """`total_seconds` and peak `resident_bytes` of a command, and the JSON of its last line if there is one."""
    import time

    from clock import wait

    began = time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, env=env)
        status, seconds, peak = wait(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for
        if status:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
        wall = time.perf_counter() - began
        out.seek(0)
        lines = out.read().splitlines()
    spent = seconds if threads == 1 else wall
    last = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return last | {"total_seconds": spent, "resident_bytes": peak}


def memory(spec: dict[str, Any]) -> dict[str, Any]:
    """Peak memory above the weights of one epoch with one loss: a second model counts, the first does not."""
    import ours
    import theirs
    from cases import order_of
    from clock import peak_above
    from workload import Setting, find_workload, small_start

    from lorasure.sites import all_sites

    with tempfile.TemporaryDirectory() as folder:
        work = find_workload(Path(spec["shared"]), Path(folder)).subset(spec["rows"])
        model = work.model() if spec["method"] == "ours" else work.plain_model()
    setting = Setting()
    start = small_start(all_sites(model), setting)
    _warm_up(model, work)
    order = order_of(work, setting)
    loss = spec["loss"]

    def ours_run() -> None:
        objective = ours.observed(model, start, *work.examples, loss, setting)
        budget = spec.get("rows_per_pass", 0) * work.tokens // work.count or ours.BUDGET
        ours.train(model, start, objective, ours.epoch(objective, setting), setting, budget=budget)

    def theirs_run() -> None:
        style = theirs.PUBLISHED if spec["method"] == "published" else theirs.TYPICAL
        theirs.train(style, model, start, *work.examples, order, loss, setting)

    return {"peak_bytes": peak_above(ours_run if spec["method"] == "ours" else theirs_run)}


def _warm_up(model, work) -> None:
    """Load what is loaded on first use."""
    import ours

    embedded = model.get_input_embeddings().weight.new_zeros((), requires_grad=True)
    inputs, mask, targets = ours.bare_batches(work.examples[0][:1], ())[0]
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[mask] + embedded
    torch.nn.functional.cross_entropy(model.lm_head(hidden), targets).backward()


def growth(spec: dict[str, Any]) -> dict[str, Any]:
    """Time (of all but the start, per token) and peak memory of importance, VILA's start and an epoch of IHL.

    On a random model and random rows.
    """
    import ours
    from clock import lasted, peak_above
    from workload import Setting, random_examples, random_model, small_start

    from lorasure.sites import all_sites

    setting = Setting(rank=spec["rank"])
    model = random_model(width=spec["width"], vocabulary=spec["vocabulary"])
    sites = all_sites(model)
    sets = [random_examples(spec["rows"], spec["length"], spec["vocabulary"], seed) for seed in (0, 1)]
    tokens = sum(len(e) for part in sets for e in part)
    forget, retain = sets
    ours.importance(model, sites, forget[:8], retain[:8], setting)
    kept: list[Any] = []

    def cost(work: Callable[[], object]) -> tuple[float, int]:
        took: list[float] = []
        peak = peak_above(lambda: took.append(lasted(work)))
        return took[0], peak

    measuring = cost(lambda: kept.append(ours.importance(model, sites, forget, retain, setting)))
    starting = cost(lambda: ours.initialise(model, sites, kept[0], setting))
    objective = ours.observed(model, sites, forget, retain, "ihl", setting)
    start = small_start(sites, setting)
    training = cost(lambda: ours.train(model, start, objective, ours.epoch(objective, setting), setting))
    return {
        "tokens": tokens,
        "importance": {"seconds_per_token": measuring[0] / tokens, "peak_bytes": measuring[1]},
        "init": {"seconds": starting[0], "peak_bytes": starting[1]},
        "ihl": {"seconds_per_token": training[0] / tokens, "peak_bytes": training[1]},
    }


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """The whole of NPO and VILA by `typical`: importance, start, five epochs, the adapter on disk."""
    import theirs
    from cases import order_of
    from clock import lasted
    from workload import EPOCHS, Setting, find_workload

    from lorasure.sites import all_sites

    setting, style = Setting(), theirs.TYPICAL
    with tempfile.TemporaryDirectory() as folder:
        work = find_workload(Path(spec["shared"]), Path(folder)).subset(spec["rows"])
        model, again = work.plain_model(), work.plain_model()  # the importance pass spoils one
    sites = all_sites(model)
    kept: list[Any] = []
    measured_in = lasted(lambda: kept.append(theirs.importance(style, again, sites, *work.examples, setting)))
    start = theirs.initialise(style, model, sites, kept[0], setting)
    order = order_of(work, setting) * EPOCHS
    trained_in = lasted(lambda: theirs.train(style, model, start, *work.examples, order, "npo", setting))
    return {"importance_seconds": measured_in, "train_seconds": trained_in}


JOBS = {"memory": memory, "growth": growth, "run": run}

if __name__ == "__main__":
    described = json.loads(sys.argv[1])
    torch.set_num_threads(described["threads"])
    print(json.dumps(JOBS[described["job"]](described)))
