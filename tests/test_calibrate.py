"""--lr auto: the ramp leaves no trace, distance does not depend on the number of steps, runs record the rate."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorasure import artifacts, calibrate, cli, pipeline, stages, train, train_stage
from lorasure.calibrate import GUESS, TRAVEL, Ramp, climb, forget_ramp, rate_for
from lorasure.config import ForgetSettings
from lorasure.errors import NumericError, UsageError
from lorasure.progress import Reporter
from lorasure.schedule import rate_shares
from lorasure.workbench import Workbench


@pytest.fixture
def settings(model_folder, data_files, tmp_path):
    """Settings of a short run without a learning rate."""
    common = {"model": str(model_folder), "forget": str(data_files[0]), "retain": str(data_files[1]), "rank": 2}

    def make(out="run", **options):
        given = common | {"epochs": 2, "batch_size": 3, "out": str(tmp_path / out)} | options
        return ForgetSettings(**given)

    return make


def prepared(settings, tmp_path):
    """(bench, objective, the model with its start) as training begins."""
    bench = Workbench(settings)
    run = tmp_path / "prepared"
    run.mkdir()
    pipeline.write_inputs(bench, run)
    start = pipeline.started(bench, run)
    return bench, bench.objective(), train_stage.attach_start(bench, start)


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_the_ramp_leaves_no_trace(settings, tmp_path):
    bench, objective, model = prepared(settings(init="vila"), tmp_path)
    before, numbers = state(model), (random.getstate(), torch.get_rng_state())
    values = iter([1.0] * 100)
    ramp = forget_ramp(objective, bench.settings)
    found = climb(model, ramp, objective, bench.settings, lambda: next(values), token_budget=200)
    assert len(found.known) > 5  # it did train
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert all(p.grad is None for p in model.parameters())
    assert random.getstate() == numbers[0] and torch.equal(torch.get_rng_state(), numbers[1])


def test_a_ramp_that_breaks_the_model_ends_there_and_leaves_no_trace(settings, tmp_path, monkeypatch):
    bench, objective, model = prepared(settings(), tmp_path)
    before, steps = state(model), []

    def broken(*args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise NumericError("train: the retain loss is inf")
        return real(*args, **kwargs)

    real = train._finite_norm
    monkeypatch.setattr(train, "_finite_norm", broken)
    found = climb(
        model, forget_ramp(objective, bench.settings), objective, bench.settings, lambda: 1.0, token_budget=99
    )
    assert len(found.known) == 4 and found.distance == pytest.approx(sum(1e-5 * 1.5**k for k in range(3)))
    assert all(torch.equal(before[name], p) for name, p in state(model).items())


def test_distance_lies_where_half_is_forgotten():
    ramp = Ramp()
    for rate, known in ((0.0, 0.8), (0.1, 0.8), (0.1, 0.6), (0.2, 0.2)):
        assert not ramp.known or not ramp.over
        ramp.add(rate, known)
    assert ramp.over and ramp.distance == pytest.approx((0.2 * 0.4) ** 0.5)  # half way from .6 to .2
    assert Ramp([0.0, 0.1, 0.3], [0.8, 0.8, 0.7]).distance == 0.3


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("known", "times"), [(0.4, TRAVEL), (0.9, GUESS)], ids=["half forgotten", "never"])
def test_a_run_travels_as_far_whatever_the_number_of_its_steps(settings, schedule, known, times):
    s, ramp = settings(schedule=schedule), Ramp([0.0, 0.03], [1.0, known])
    rates = {steps: rate_for(ramp, s, steps) for steps in (5, 50, 500)}
    assert rates[5] > rates[50] > rates[500]
    for steps, rate in rates.items():
        shares = rate_shares(s, steps)
        assert rate * sum(shares(i) for i in range(steps)) == pytest.approx(times * 0.03)


@pytest.mark.parametrize(("known", "forgotten"), [(0.9, False), (0.1, True)])
def test_a_rate_from_a_ramp_that_forgot_little_is_said_to_be_a_guess(settings, monkeypatch, known, forgotten):
    notes, values = [], chain([1.0], repeat(known))
    monkeypatch.setattr(Reporter, "note", lambda _, text: notes.append(text))
    monkeypatch.setattr(train_stage, "mean_probability", lambda *_: SimpleNamespace(value=next(values)))
    found = pipeline.forget(settings()).summary["learning_rate"]
    assert found["half_forgotten"] is forgotten
    assert any("the rate is a guess; --lr gives one" in note for note in notes) is not forgotten


def test_a_run_records_its_rate_and_takes_it(settings):
    found = pipeline.forget(settings())
    said = found.summary["learning_rate"]
    assert said["rate"] > 0 and said["steps"] > 0 and found.summary["settings"]["lr"] == "auto"
    log = [json.loads(line) for line in (found.folder / artifacts.LOG).read_text().splitlines()]
    given = pipeline.forget(settings("given", lr=said["rate"]))
    assert "learning_rate" not in given.summary
    other = [json.loads(line) for line in (given.folder / artifacts.LOG).read_text().splitlines()]
    same = ("step", "lr", "forget", "retain", "grad_norm")
    assert [{key: line[key] for key in same} for line in log] == [{key: line[key] for key in same} for line in other]
    assert stages.verdict(found.summary)["text"] == found.summary["verdict"]["text"]


def test_a_rate_given_to_a_continued_run_is_the_one_advised_on(settings, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_stage, "logged_fit", stop)
        pipeline.forget(settings())
    monkeypatch.setattr(stages, "HARDLY_KNOWN", 0)  # the model is untrained
    found = pipeline.forget(settings(resume=True, lr=1e-9, allow_change="lr")).summary
    assert found["learning_rate"]["rate"] > 1e-9  # what auto had found stays on record
    assert "--lr 3e-09" in found["verdict"]["text"]


def test_a_continued_run_does_not_calibrate_again(settings, monkeypatch):
    whole = pipeline.forget(settings("whole"))
    real, calls = train._step, []

    def interrupted(training, *args):
        if training.optimizer.param_groups[0]["lr"] != 0 and training.scheduler.base_lrs[0] != calibrate.FIRST:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
        return real(training, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_step", interrupted)
        pipeline.forget(settings(checkpoint_every=1))
    monkeypatch.setattr(train_stage, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    continued = pipeline.forget(settings(resume=True))
    one, other = (artifacts.sha256(r.adapter / "adapter_model.safetensors") for r in (whole, continued))
    assert one == other


def test_words_that_are_no_rate(settings, capfd, tmp_path):
    with pytest.raises(UsageError, match="--lr must be a number or auto, got 'fast'"):
        settings(lr="fast")
    s = settings()
    flags = [
        "--model",
        s.model,
        "--forget",
        s.forget,
        "--retain",
        s.retain,
        "--out",
        str(tmp_path / "x"),
        "--lr",
        "fast",
    ]
    assert cli.main(["forget", *flags]) == 2
    assert "--lr must be a number or auto, got 'fast'" in capfd.readouterr().err
    assert not Path(tmp_path / "x").exists() and replace(s, lr="3e-4").lr == 3e-4
