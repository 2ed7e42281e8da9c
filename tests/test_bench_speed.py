"""The speed benchmark: what it compares computes the same, and it runs to its end on a model that it makes itself."""

# ruff: noqa: E402
from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import random_examples, tiny_llama
from lorasure.models import find_shortcuts
from lorasure.sites import all_sites

SPEED = Path(__file__).resolve().parents[1] / "benchmarks" / "speed"
sys.path.append(str(SPEED))

import ours
import table
import theirs
from cases import PARTS
from clock import alternate, can_measure_memory, ratios
from worker import in_process
from workload import Setting, small_start

FORGET, RETAIN = random_examples(10, 1), random_examples(10, 2)
PAIRS = [(i, 9 - i) for i in range(10)]
SETTING = Setting(rank=2, alpha=4, batch_size=5, lr=1e-2, lam=0.7, beta=0.3)
ONE_BY_ONE = dataclasses.replace(theirs.TYPICAL, rows=1)


def steps_of(train) -> list[tuple[dict, list[torch.Tensor]]]:
    """Losses and gradients of every step, A before B, site by site."""
    kept = []

    def keep(losses, model) -> None:
        gradients = [p.grad.flatten().clone() for p in model.parameters() if p.requires_grad]
        kept.append((losses, gradients))

    train(keep)
    return kept


def both(loss: str, style: theirs.Style, setting: Setting = SETTING):
    model = tiny_llama()
    other = copy.deepcopy(model)
    find_shortcuts(model)
    start = small_start(all_sites(model), setting)
    objective = ours.observed(model, start, FORGET, RETAIN, loss, setting)
    steps = [objective.step(PAIRS[:5]), objective.step(PAIRS[5:])]
    mine = steps_of(lambda keep: ours.train(model, start, objective, steps, setting, budget=60, on_step=keep))
    rest = (FORGET, RETAIN, PAIRS, loss, SETTING)
    theirs_ = steps_of(lambda keep: theirs.train(style, other, start, *rest, on_step=keep))
    return mine, theirs_


def assert_same_steps(mine, others) -> None:
    assert len(mine) == len(others) == 2
    for (losses, gradients), (other_losses, other_gradients) in zip(mine, others, strict=True):
        assert losses == pytest.approx(other_losses, rel=1e-5)
        scale = max(float(g.abs().max()) for g in other_gradients)
        for gradient, other in zip(gradients, other_gradients, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("style", [theirs.TYPICAL, theirs.PUBLISHED], ids=["typical", "published"])
@pytest.mark.parametrize("loss", ["ihl", "npo"])
def test_losses_and_gradients_are_those_of_the_others(loss: str, style: theirs.Style) -> None:
    narrow = dataclasses.replace(style, width=style.width and 40)
    assert_same_steps(*both(loss, narrow))


def test_the_comparison_of_steps_can_fail() -> None:
    with pytest.raises(AssertionError):
        assert_same_steps(*both("npo", theirs.TYPICAL, dataclasses.replace(SETTING, lam=0.701)))


def test_importance_is_that_of_automatic_differentiation_one_row_at_a_time() -> None:
    model = tiny_llama()
    sites = all_sites(model)
    mine = ours.importance(model, sites, FORGET, RETAIN, SETTING)
    found = theirs.importance(ONE_BY_ONE, copy.deepcopy(model), sites, FORGET, RETAIN, SETTING)
    for moments, part in zip((mine.forget, mine.retain), found, strict=True):
        for site in sites:
            for factor in "AB":
                mean, square = part[f"base_model.model.{site.module}.lora_{factor}.default.weight"]
                kept = moments[site.name][factor]
                torch.testing.assert_close(kept.mean, mean, rtol=1e-5, atol=1e-5 * float(mean.abs().max()))
                torch.testing.assert_close(kept.second, square, rtol=1e-5, atol=1e-5 * float(square.max()))


def test_published_pads_every_row_to_the_same_width() -> None:
    assert theirs.padded(FORGET[:3], 500)["input_ids"].shape == (3, 500)
    assert theirs.padded(FORGET[:3], None)["input_ids"].shape == (3, max(map(len, FORGET[:3])))


def test_runs_alternate_and_ratios_are_per_row_and_round() -> None:
    told = []
    times = alternate({"a": lambda: 2.0, "b": lambda: 3.0}, 2, told.append)
    assert [line[0] for line in told] == ["a", "b", "b", "a"]
    assert ratios(times, {"a": 4, "b": 1}, "a") == {"b": {"median": 6.0, "low": 6.0, "high": 6.0}}


@pytest.mark.slow
def test_the_command_runs_to_its_end_without_the_shared_folder(tmp_path: Path) -> None:
    results = tmp_path / "speed.json"
    flags = ["--quick", "--rows=2", "--rounds=1", "--parts=importance,init,step", f"--shared={tmp_path}"]
    command = [sys.executable, "-W", "ignore", str(SPEED / "bench.py"), f"--results={results}"]
    subprocess.run([*command, *flags], check=True, capture_output=True)
    found = json.loads(results.read_text())
    assert results.with_suffix(".png").is_file()
    assert {name for group in PARTS.values() for name in group} == set(found["parts"])
    shown = subprocess.run([*command, "--table"], check=True, capture_output=True, text=True).stdout
    assert shown.startswith(table.table(found))


@pytest.mark.slow
@pytest.mark.skipif(not can_measure_memory(), reason="peak memory is read from Linux's /proc")
def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    spec = {"job": "memory", "shared": str(tmp_path), "loss": "npo", "threads": 1, "method": "ours", "rows": 4}
    assert in_process(spec)["peak_bytes"] > 2**20


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu_with_a_small_shape() -> None:
    command = [sys.executable, "-W", "ignore", str(SPEED / "gpu_7b.py"), "--tiny"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert all(
        stage in shown for stage in ("importance, lora", "importance, full", "init", "npo, 1 epochs", "ihl, 1 epochs")
    )
