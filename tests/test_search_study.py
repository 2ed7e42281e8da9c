"""The trials of a study: as many as asked for, each run once, whoever comes, goes or dies; no model involved."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorasure.search.search import _line
from lorasure.search.spec import Method, Range, Spec
from lorasure.search.study import JOURNAL, LOCKS, Study

RANGES = {"lr": Range(low=1e-4, high=1e-1, log=True), "rank": Range(low=2, high=8), "loss": Range(("ihl", "npo"))}
DONE = {"state": "complete", "scores": {}, "seconds": 0.0}


@pytest.fixture
def opened(tmp_path):
    """A study in the test's folder, as any worker opens it."""
    (tmp_path / LOCKS).mkdir()

    def open_it(trials=3, methods=("a", "b"), **options):
        given = {"sampler": "random", "seed": 0, "utility_floor": 0.95, "evaluation": None, "reference": None} | options
        return Study(tmp_path, Spec({name: Method(None, RANGES) for name in methods}, trials, **given))

    return open_it


def run_all(study, value=lambda trial: 0.5, result=lambda trial: DONE):
    """Run what is left; the trials run."""
    done = []
    while not study.finished:
        with study.next_trial() as trial:
            if trial:
                study.finish(trial, result(trial), value(trial))
                done.append(trial)
    return done


def test_every_method_gets_the_same_number_of_trials_in_turn(opened):
    study = opened()
    names = [trial.name for trial in run_all(study)]
    assert names == ["a-0000", "b-0000", "a-0001", "b-0001", "a-0002", "b-0002"]
    with study.next_trial() as trial:
        assert trial is None
    assert [line["state"] for line in study.lines()] == ["complete"] * 6
    assert run_all(opened()) == []  # whoever comes later has nothing to do


def test_parameters_lie_in_their_ranges_and_differ(opened):
    params = [trial.params for trial in run_all(opened(trials=8, methods=("a",)))]
    assert all(1e-4 <= p["lr"] <= 1e-1 and 2 <= p["rank"] <= 8 and p["loss"] in ("ihl", "npo") for p in params)
    assert all(type(p["rank"]) is int for p in params)
    assert len({p["lr"] for p in params}) == 8 and min(p["lr"] for p in params) < 3e-3  # log-uniform


def test_random_parameters_depend_on_seed_method_and_number_alone(opened, tmp_path):
    alone = {t.name: t.params for t in run_all(opened())}
    (tmp_path / JOURNAL).unlink()
    one, other = opened(), opened()
    with one.next_trial() as first, other.next_trial() as second:  # two workers at once, the later one faster
        assert (first.name, second.name) == ("a-0000", "b-0000")
        other.finish(second, DONE, 0.0)
        with other.next_trial() as third:
            other.finish(third, DONE, 0.9)
        one.finish(first, DONE, 0.1)
    run_all(one)
    assert {f"{x['method']}-{x['trial']:04d}": x["params"] for x in other.lines()} == alone
    (tmp_path / JOURNAL).unlink()
    assert {t.name: t.params for t in run_all(opened(seed=1))} != alone


def test_many_workers_run_every_trial_exactly_once(opened, monkeypatch):
    opened(trials=6)
    take = Study._take  # with a pause between seeing what is free and taking it, in which others could do the same
    monkeypatch.setattr(Study, "_take", lambda *args: time.sleep(0.02) or take(*args))
    with ThreadPoolExecutor(6) as pool:
        ran = [t.name for part in pool.map(lambda _: run_all(opened(trials=6)), range(6)) for t in part]
    assert sorted(ran) == sorted(f"{method}-{i:04d}" for method in "ab" for i in range(6))


def test_a_trial_whose_worker_died_is_taken_up_with_its_parameters(opened):
    study = opened(sampler="tpe")
    with study.next_trial() as lost, opened(sampler="tpe").next_trial() as other:
        assert other.name != lost.name  # while it lives, nobody takes it
    # Both blocks ended without `finish`, and so without their locks, as those of killed processes do.
    with opened(sampler="tpe").next_trial() as again:
        assert again == lost
    assert len(run_all(opened(sampler="tpe"))) == 6
    assert len(study.lines()) == 6


def test_a_trial_that_died_between_its_result_and_its_state_is_finished(opened, monkeypatch):
    study = opened(trials=1, methods=("a",))
    with study.next_trial() as trial, monkeypatch.context() as patch:
        patch.setattr(study.storage, "set_trial_state_values", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study.finish(trial, DONE, 0.5)
    again = opened(trials=1, methods=("a",))
    with again.next_trial() as left:
        assert left is None and again.finished


def test_a_torn_last_line_costs_what_it_said_and_nothing_else(opened, tmp_path):
    study = opened(trials=2, methods=("a",))
    with study.next_trial() as trial:
        study.finish(trial, DONE, 0.5)
    whole = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(whole + b'{"op_code": 4, "worker')
    again = opened(trials=2, methods=("a",))
    assert [line["state"] for line in again.lines()] == ["complete"]
    assert [t.name for t in run_all(again)] == ["a-0001"]


def test_tpe_learns_from_what_was_measured(opened, tmp_path):
    def near(trial):
        return abs(trial.params["rank"] - 3) / 10

    guided = run_all(opened(trials=30, methods=("a",), sampler="tpe"), near)
    (tmp_path / JOURNAL).unlink()
    blind = run_all(opened(trials=30, methods=("a",)), near)
    assert sum(map(near, guided[10:])) < 0.6 * sum(map(near, blind[10:]))


def test_tpe_learns_from_how_far_stopped_trials_came(opened, tmp_path):
    """Where nearly all are stopped, what they are charged says which way is better."""

    def near(trial):
        return 1 + abs(trial.params["rank"] - 3) / 10

    def stopped(trial):
        return DONE if trial.index == 0 else {"state": "stopped", "reason": "it broke", "seconds": 0.0}

    study = opened(trials=30, methods=("a",), sampler="tpe")
    guided = run_all(study, near, stopped)
    assert [line["state"] for line in opened(trials=30, methods=("a",)).lines()] == ["complete"] + ["stopped"] * 29
    (tmp_path / JOURNAL).unlink()
    blind = run_all(opened(trials=30, methods=("a",)), near)
    assert sum(near(t) - 1 for t in guided[10:]) < 0.6 * sum(near(t) - 1 for t in blind[10:])


def test_the_journal_is_private(opened, tmp_path):
    opened()
    assert (tmp_path / JOURNAL).stat().st_mode & 0o777 == 0o600


def test_a_trial_is_told_on_one_line():
    scores = {"extraction_strength": 0.25, "share": 0.97}
    assert _line("a-0001", DONE | {"scores": scores}) == (
        "a-0001: extraction strength 0.2500, utility 97.0% of the original, 0.0 s"
    )
    assert _line("a-0001", {"state": "stopped", "reason": "it broke", "seconds": 2}) == (
        "a-0001: stopped: it broke, 2.0 s"
    )
