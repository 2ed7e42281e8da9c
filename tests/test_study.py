"""The study's bookkeeping: what is stored is not run again, and the tables say what is stored."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

QUALITY = Path(__file__).resolve().parents[1] / "benchmarks" / "quality"


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(QUALITY))
    yield
    for name in ("study", "cells", "tables"):
        sys.modules.pop(name, None)


def trial(method, number, share, preference, state="complete"):
    scores = {"share": share, "utility": share, "extraction_strength": 0.01}
    scores["forget_probability"] = 10.0 ** -(number + 2)
    return {
        "method": method,
        "trial": number,
        "params": {"lr": 1e-3 * (number + 1), "lambda": 1.0},
        "state": state,
        "scores": scores | {"truth_preference": preference},
    }


def tuned():
    level = {"extraction_strength": 0.03, "forget_probability": 0.005, "truth_preference": 0.5}
    own = [trial("contrast", 0, 0.99, 0.7), trial("contrast", 1, 0.986, 0.6), trial("contrast", 2, 0.96, 0.5)]
    return {
        "about": {"loss": "ihl"},
        "level": level,
        "trials": [*own, trial("lora", 0, 0.96, 0.6), trial("lora", 1, 0.9, 0.5, "stopped")],
    }


def run_line(start, seed, quality, split="forget05"):
    def scores(probability, utility):
        score = {"value": probability, "n": 200}
        quality_score = {"value": quality, "n": 200, "statistic": 0.2}
        rest = {"extraction_strength": score, "truth_preference": score, "utility": {"value": utility}}
        return {"probability": score, "forget_quality": quality_score} | rest

    found = {"unlearned": scores(0.01, 0.79), "target": scores(0.9, 0.8), "retrained": scores(0.002, 0.8)}
    return {"cell": f"ihl/{start}/{split}/{seed}", "scores": found, "seconds": 50.0, "short": ""}


ATTACKED = [("vila", "unlearned"), ("contrast", "unlearned", "retrained")]


def attacks_on(*subjects):
    points = [("none", None), ("quantise", 4), ("relearn-few", 100)]
    strength = {"unlearned": 0.01, "retrained": 0.1}
    return [
        {"attack": attack, "point": point, "subject": s, "scores": {"extraction_strength": {"value": strength[s] * n}}}
        for s in subjects
        for n, (attack, point) in enumerate(points, start=1)
    ]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    import study

    monkeypatch.setattr(study, "STORED", tmp_path / "results")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tune-ihl.json").write_text(json.dumps(tuned()))
    return tmp_path / "results"


def test_the_chosen_trial_keeps_enough_where_one_does(stored):
    import study

    picked = {start: settings for start, _, settings in study.chosen("ihl", list(study.STARTS))}
    assert picked["contrast"]["lr"] == 2e-3 and picked["contrast"]["score"] == "variance"
    assert picked["lora"]["lr"] == 1e-3 and picked.keys() == {"contrast", "lora"}
    assert study.chosen("npo", list(study.STARTS)) == []


def test_a_start_is_run_by_the_papers_rule_as_well_where_that_chooses_another_trial(stored):
    import study

    def found(*starts):
        return [(name, settings["lr"]) for name, _, settings in study.by_the_floor("ihl", list(starts))]

    # Of plain LoRA no trial keeps .98, so this rule has chosen already.
    assert found("contrast", "lora", "vila") == [("contrast, 95% kept", 3e-3)]
    kept = tuned()
    kept["trials"].append(trial("lora", 2, 0.99, 0.9))
    (stored / "tune-ihl.json").write_text(json.dumps(kept))
    assert found("lora") == [("lora, 95% kept", 1e-3)] and study.chosen("ihl", ["lora"])[0][2]["lr"] == 3e-3


def test_what_is_stored_is_not_run_again(stored, monkeypatch, tmp_path):
    import study

    ran = []

    def pretend(cell, a):
        ran.append(study.cell_name(cell))
        return run_line(cell.start, cell.seed, -2.0)

    monkeypatch.setattr(study, "in_process", pretend)
    monkeypatch.setattr(study, "measure_references", lambda *_: None)
    of_another_split = ("ihl", "contrast", "forget10", "3 epochs", {"epochs": 3})
    monkeypatch.setattr(study, "VARIANTS", [of_another_split])
    a = argparse.Namespace(groups=["ihl"], starts=["contrast"], splits=["forget05"], workers=2, work=tmp_path)
    (stored / "runs.jsonl").write_text(json.dumps(run_line("contrast", 3, -1.0)) + "\n")
    study.runs(a, None)
    by_floor = [f"ihl/contrast, 95% kept/forget05/{seed}" for seed in range(5)]
    assert sorted(ran) == by_floor + [f"ihl/contrast/forget05/{seed}" for seed in (0, 1, 2, 4)]
    study.runs(a, None)
    assert len(ran) == 9 and len((stored / "runs.jsonl").read_text().splitlines()) == 10


def test_the_retrained_model_is_attacked_once(stored, monkeypatch):
    import study

    wanted = []
    monkeypatch.setattr(study, "finish", lambda cells, *_: wanted.extend(cells))
    monkeypatch.setattr(study, "ATTACKED_TOO", [("bga", "contrast, 95% kept")])
    (stored / "tune-bga.json").write_text(json.dumps(tuned()))
    study.attacks(argparse.Namespace(groups=["ihl", "bga"], starts=["contrast", "lora"]), None)
    found = {(cell.loss, cell.start): cell.attacked for cell in wanted}
    assert found == {
        ("ihl", "contrast"): "alone",
        ("ihl", "lora"): "alone",
        ("bga", "contrast"): "retrained",
        ("bga", "contrast, 95% kept"): "alone",
        ("bga", "lora"): "alone",
    }


def test_tables_say_what_is_stored(stored, tmp_path):
    import tables

    lines = [run_line("contrast", seed, quality) for seed, quality in enumerate((-1.0, -2.0, -3.0))]
    lines += [run_line("lora", 0, -9.5), {"cell": "ihl/lora/forget05/1", "stopped": "train: it diverged"}]
    (stored / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    attacked = [run_line(start, 0, -1.0) | {"attacks": attacks_on(*subjects)} for start, *subjects in ATTACKED]
    attacked.append(lines[-1])  # nothing was there to attack
    (stored / "attacks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in attacked))
    (tmp_path / "docs").mkdir()
    marks = "".join(
        f"<!-- {name} -->\nold\n<!-- end {name} -->\n" for name in ("tuned", "explained", "runs", "attacks")
    )
    (tmp_path / "docs" / "study.md").write_text("before\n" + marks)
    (tmp_path / "README.md").write_text("<!-- study -->\nold\n<!-- end study -->\nafter\n")
    for _ in range(2):  # the second time changes nothing
        tables.write_tables(stored, tmp_path)
        page, readme = (tmp_path / "docs" / "study.md").read_text(), (tmp_path / "README.md").read_text()
        assert "old" not in page + readme and page.startswith("before\n") and readme.endswith("after\n")
        assert "| ihl | contrast | 3 (0) | lr 0.002, lambda 1 | 98.6% | 0.010 | 0.60 |" in page
        assert "| ihl | 4 | 1.00 | 1.00 | - |" in page  # log of the probability is what the rate says
        assert (
            "| ihl | forget05 | contrast | 3 | -2.00 ± 2.48 | 98.8% ± 0.0% | 0.200 (n 200) | 0.0100 ± 0.0000 |" in page
        )
        assert "| ihl | forget05 | lora | 1, 1 stopped | -9.50 |" in page
        assert "| ihl | lora | - | -9.50 | - | -, 98.8%, - |" in readme
        own, others = "| 0.010 | - | 0.020 | - | 0.030 |", "| 0.100 | - | 0.200 | - | 0.300 |"
        rows = [f"| ihl | contrast {own}", f"| ihl | vila {own}", f"| - | the retrained model {others}"]
        assert "\n".join(rows) in page


def test_what_settings_explain_is_told_from_chance():
    import numpy as np
    import tables

    rng = np.random.default_rng(0)
    x, starts, noise = rng.normal(size=(3, 2000))
    truth = {"x": 0.5, "x and start": 0.75}  # of the variance of x + start / sqrt 2 + noise / sqrt 2: 1, .5, .5
    y = x + (starts + noise) / np.sqrt(2)
    assert float(tables.explained(x[:, None], y)) == pytest.approx(truth["x"], abs=0.03)
    both = np.column_stack([x, starts, 1 - starts])  # one column follows from the others
    assert float(tables.explained(both, y)) == pytest.approx(truth["x and start"], abs=0.03)
    few = rng.normal(size=(200, 40, 30))  # thirty columns of chance for forty rows
    found = [float(tables.explained(columns, rng.normal(size=40))) for columns in few]
    assert abs(np.mean(found)) < 0.1


def test_without_models_it_says_so(tmp_path):
    command = [sys.executable, str(QUALITY / "study.py"), "--shared", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("skipped: ")
