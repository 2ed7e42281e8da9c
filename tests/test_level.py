"""--stop auto: forgetting rests at the level of unseen text, comes back below it, and resumes as it was."""

from __future__ import annotations

import json

import pytest

from conftest import write_rows
from lorasure import artifacts, cli, pipeline, train, train_stage
from lorasure.config import ForgetSettings
from lorasure.errors import DataError, UsageError
from lorasure.level import EVERY, Level
from lorasure.stages import mean_nll
from lorasure.workbench import Workbench

ROWS = [{"question": f"Who is number {i}?", "answer": f"It is person {i * 7}."} for i in range(16)]


@pytest.fixture
def settings(model_folder, tmp_path):
    """Settings of a short run that stops at the level of rows it never saw."""
    parts = {"forget": ROWS[:6], "retain": ROWS[6:12], "unseen": ROWS[12:]}
    files = {name: str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in parts.items()}
    common = {
        "model": str(model_folder),
        **files,
        "rank": 2,
        "epochs": 6,
        "batch_size": 3,
        "lr": 2e-2,
        "loss": "npo",
        "stop": "auto",
    }

    def make(out="run", **options):
        return ForgetSettings(**common | {"out": str(tmp_path / out)} | options)

    return make


def log_of(run):
    lines = [json.loads(line) for line in (run / artifacts.LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_forgetting_rests_at_the_level_and_comes_back_below_it():
    values, weights = iter([1.0, 2.0, 3.0, 1.9]), {"retain": 0.5}
    level = Level(lambda: next(values), 2.0, weights)
    assert weights == {"retain": 0.5, "forget": 1.0}
    found = []
    for step in range(1, 4 * EVERY + 1):
        level.after_step(step)
        found.append(weights["forget"])
    assert found[EVERY - 1 :: EVERY] == [1.0, 0.0, 0.0, 1.0]
    assert level.seen == [[EVERY * (i + 1), nll] for i, nll in enumerate([1.0, 2.0, 3.0, 1.9])]
    other = Level(lambda: 0.0, 2.0, {})
    other.restore([[2, 5.0]])
    assert other.rests and other.weights == {"forget": 0.0}


def test_a_step_at_rest_follows_the_retain_loss_alone(settings, monkeypatch):
    """With the level at 0 every step but the first EVERY is one of the retain loss: as if there were no forget loss."""
    monkeypatch.setattr(train_stage, "mean_nll", lambda bench, model, rows: 0.0)
    found = pipeline.forget(settings())
    weights = [line["forget_weight"] for line in log_of(found.folder)]
    assert weights == [1.0] * EVERY + [0.0] * (len(weights) - EVERY)
    seen, real = [], train._backward
    monkeypatch.setattr(
        train,
        "_backward",
        lambda *a: (seen.append(dict(a[3])), real(*a))[1],
    )
    pipeline.forget(settings("again"))
    assert [w["forget"] for w in seen] == weights and all(w["retain"] == 1.0 for w in seen)


def test_the_run_ends_nearer_to_the_level_than_one_that_does_not_stop(settings):
    bench = Workbench(settings())
    level = mean_nll(bench, bench.model, bench.unseen.examples)
    far, near = (
        pipeline.forget(settings(f"run-{stop}", stop=stop, unseen=file))
        for stop, file in [(None, None), ("auto", bench.settings.unseen)]
    )
    assert near.summary["stop"]["level"] == pytest.approx(level) and near.summary["stop"]["rows"] == 4
    assert "stop" not in far.summary and "forget_weight" not in log_of(far.folder)[0]
    weights = [line["forget_weight"] for line in log_of(near.folder)]
    assert 0.0 in weights and weights[0] == 1.0
    assert near.summary["after"]["forget"]["value"] > far.summary["after"]["forget"]["value"]


def test_interrupted_after_every_step_it_ends_in_the_same_bytes(settings, monkeypatch):
    whole = pipeline.forget(settings("whole"))
    weights = [line["forget_weight"] for line in log_of(whole.folder)]
    assert {0.0, 1.0} == set(weights)
    real, count = train._step, 0
    while True:
        taken = []

        def one(*args):
            taken.append(1)  # noqa: B023
            if len(taken) == 2:  # noqa: B023
                raise KeyboardInterrupt
            return real(*args)

        try:
            with monkeypatch.context() as patch:
                patch.setattr(train, "_step", one)
                found = pipeline.forget(settings(resume=count > 0, checkpoint_every=1))
            break
        except KeyboardInterrupt:
            count += 1
    assert count == len(weights) - 1 and log_of(found.folder) == log_of(whole.folder)
    assert found.summary["stop"] == whole.summary["stop"]
    one, other = (artifacts.sha256(r.folder / artifacts.TRAINED) for r in (whole, found))
    assert one == other


def test_wrong_answers_of_the_forget_rows_give_the_level(settings, tmp_path):
    rows = [row | {"perturbed_answer": [f"It is cat {i}.", "No."]} for i, row in enumerate(ROWS[:5])]
    bench = Workbench(settings(forget=str(write_rows(tmp_path / "f.jsonl", [*rows, ROWS[5]])), unseen=None))
    assert [bench.tokenizer.decode(e.input_ids[e.answer_start : -1]).strip() for e in bench.unseen.examples] == [
        f"It is cat {i}." for i in range(5)
    ]
    bad = write_rows(tmp_path / "bad.jsonl", [ROWS[0] | {"perturbed_answer": "one"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:1: 'perturbed_answer' must be a list"):
        _ = Workbench(settings(forget=str(bad), unseen=None)).unseen


def test_nothing_to_take_a_level_from_is_said_before_anything_is_written(settings, tmp_path, capsys):
    s = settings()
    files = ["--model", s.model, "--forget", s.forget, "--retain", s.retain, "--out", str(tmp_path / "x")]
    assert cli.main(["forget", *files, "--stop", "auto"]) == 3
    assert "bring no perturbed_answer; name text like them that the model never saw with --unseen" in (
        " ".join(capsys.readouterr().err.split())
    )
    assert not (tmp_path / "x").exists() and not (tmp_path / ".x.partial").exists()
    for options, text in (
        ({"stop": "now"}, "--stop must be auto"),
        ({"stop": None}, "--unseen is for --stop auto"),
        ({"loss": "ga"}, "--stop goes by the retain loss"),
    ):
        with pytest.raises(UsageError, match=text):
            Workbench(settings(**options))
    with pytest.raises(DataError, match="are the same row"):
        _ = Workbench(settings(unseen=s.forget)).unseen


def test_other_unseen_rows_are_another_run_and_another_level(settings, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_stage, "logged_fit", stop)
        pipeline.forget(settings())
    write_rows(tmp_path / "unseen.jsonl", ROWS[13:])
    with pytest.raises((UsageError, DataError), match="unseen"):
        pipeline.forget(settings(resume=True))
    found = pipeline.forget(settings(resume=True, allow_change="unseen_text,unseen_tokens")).summary["stop"]
    bench = Workbench(settings())
    assert found["rows"] == 3 and found["level"] == pytest.approx(mean_nll(bench, bench.model, bench.unseen.examples))
