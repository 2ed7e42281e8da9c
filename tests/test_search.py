"""A search from SPEC to table: shared model and importance, stopped, killed and joined; then the best as real runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from conftest import tiny_llama, write_rows
from lorasure import artifacts, checkpoint, cli, folders, lora, stages, train
from lorasure.errors import DataError, ResourceError, UsageError
from lorasure.models import load_tokenizer
from lorasure.progress import Reporter
from lorasure.search import search as command
from lorasure.search.measure import Measure
from lorasure.search.read import read_spec
from lorasure.search.search import search
from lorasure.search.settings import SearchSettings
from lorasure.search.study import LOCKS, Trial
from lorasure.search.trial import IMPORTANCE, Runner
from lorasure.yaml_file import read_yaml

METHODS = {
    "plain": {"init": "lora"},
    "vila": {"init": "vila", "ranges": {"coverage": [0.5, 1.0]}},
    "fila": {"init": "vila", "score": "fisher", "export_scale": 0.9},
}


def row(i):
    return {"question": f"Who is Quorvexia {i}?", "answer": f"It is Thessalune {i * 7}."}


@pytest.fixture
def spec(tmp_path, model_folder):
    """A function that writes SPEC.yaml and returns its path; keyword arguments override keys."""
    parts = {"forget": range(6), "retain": range(6, 16), "held": range(16, 22)}
    paths = {name: str(write_rows(tmp_path / f"{name}.jsonl", [row(i) for i in part])) for name, part in parts.items()}
    fixed = {"model": str(model_folder), "rank": 2, "epochs": 2, "batch_size": 3}
    fixed |= {name: paths[name] for name in ("forget", "retain")}

    def write(name="spec.yaml", **changes):
        content = {
            "settings": fixed,
            "methods": METHODS,
            "ranges": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}},
            "trials": 2,
            "utility_floor": 0.5,
            "evaluation": {"retain": paths["held"]},
        }
        (tmp_path / name).write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return tmp_path / name

    return write


@pytest.fixture
def out(tmp_path):
    return tmp_path / "search"


def lines(out):
    return [json.loads(text) for text in (out / "trials.jsonl").read_text().splitlines()]


def runner(spec, folder):
    for name in (LOCKS, IMPORTANCE):
        (folder / name).mkdir(parents=True)
    return Runner(folder, read_spec(spec), Reporter(quiet=True), "cpu")


def state_of(model):
    """Every module by name and class, every tensor by its bits, and what requires a gradient."""
    digest = hashlib.sha256(repr([(n, type(m).__name__) for n, m in model.named_modules()]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest(), [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.slow
def test_a_search_from_spec_to_best_runs(spec, out, monkeypatch):
    measured = []
    real = stages.measure
    monkeypatch.setattr(stages, "measure", lambda *args, **given: measured.append(1) or real(*args, **given))
    first = search(spec(), SearchSettings(out=str(out), trials_only=True))
    assert not list((out / "best").iterdir()) and not list((out / "evaluations").iterdir())
    result = search(spec(), SearchSettings(out=str(out), resume=True))
    assert all(first["methods"][name]["chosen"] == row["chosen"] for name, row in result["methods"].items())
    assert [(x["method"], x["trial"]) for x in lines(out)] == [(m, i) for m in METHODS for i in range(2)]
    assert all(x["state"] == "complete" and x["seconds"] > 0 for x in lines(out))
    assert len(measured) == 1  # for vila and fila, all trials and the best runs: one set of moments
    for name, row in result["methods"].items():
        best = row["chosen"]
        assert best in lines(out) and best["scores"]["share"] >= 0.5
        folders.verify(out / "best" / name)
        config = read_yaml(out / "best" / name / "config.yaml")
        assert {key: config[key] for key in best["params"]} == best["params"]
        # The exported adapter on a fresh model has the scores that the trial had on the shared one.
        scores = artifacts.read_json(out / "evaluations" / name / "scores.json")
        assert scores["forget_probability"]["value"] == pytest.approx(best["scores"]["forget_probability"], rel=1e-5)
        utility = scores["model_utility_without_rouge"]["value"]
        assert utility == pytest.approx(best["scores"]["utility"], rel=1e-5)
    assert (out / "forgetting_utility.svg").is_file() and (out / "forgetting_utility.png").is_file()
    assert list((out / LOCKS).iterdir()) == []
    again = search(spec(), SearchSettings(out=str(out), resume=True))
    assert again == result and len(measured) == 1


def test_nothing_in_the_folder_is_open_to_others_or_holds_text(spec, out, capsys):
    assert cli.main(["search", str(spec(trials=1)), "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["methods"].keys() == METHODS.keys()
    paths = list(out.rglob("*"))
    assert [p for p in (out, *paths) if p.stat().st_mode & 0o077] == []
    content = b"".join(p.read_bytes() for p in paths if p.is_file()) + (printed.out + printed.err).encode()
    assert b"Quorvexia" not in content and b"Thessalune" not in content


def test_a_trial_leaves_the_shared_model_bit_for_bit(spec, out):
    bench = runner(spec(), out)
    before = state_of(bench.bench.model)
    first, _ = bench.run(Trial("vila", 0, {"lr": 0.01, "coverage": 0.5}))
    assert state_of(bench.bench.model) == before
    bench.run(Trial("plain", 0, {"lr": 0.1}))
    assert state_of(bench.bench.model) == before and before[1] == []
    again, _ = bench.run(Trial("vila", 0, {"lr": 0.01, "coverage": 0.5}))
    assert again["scores"] == first["scores"] and first["state"] == "complete"


@pytest.mark.parametrize("process", [os.getpid(), 1], ids=["its own number", "another"])
def test_importance_that_a_killed_worker_left_unfinished_goes(spec, out, tmp_path, process):
    trial = Trial("vila", 0, {"lr": 0.01, "coverage": 0.5})
    key = Path(runner(spec(), tmp_path / "other").settings(trial, out).importance).name
    left = out / IMPORTANCE / f".{key}.partial-{process}"
    bench = runner(spec(), out)
    left.mkdir()
    (left / "importance.safetensors").write_bytes(b"half")
    assert bench.run(trial)[0]["state"] == "complete"
    assert [path.name for path in (out / IMPORTANCE).iterdir()] == [key]


def test_an_interrupted_trial_goes_on_from_its_checkpoint_to_the_same_scores(spec, out, tmp_path, monkeypatch):
    trial = Trial("plain", 0, {"lr": 0.01})
    whole, _ = runner(spec(), tmp_path / "whole").run(trial)
    bench = runner(spec(), out)
    assert bench.measure.original
    monkeypatch.setattr(checkpoint, "SECONDS_APART", 0.0)
    monkeypatch.setattr(checkpoint, "TIME_SHARE", 1e9)
    steps, real = [], train._step
    monkeypatch.setattr(train, "_step", lambda *args: steps.append(1) or real(*args))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Measure, "utility", interrupted)
        bench.run(trial)
    assert len(steps) == 2  # of 4; the second one's epoch ended with the interruption
    assert bench.run(trial)[0]["scores"] == whole["scores"]
    assert len(steps) == 2 + 3


def interrupted(self, model):
    raise KeyboardInterrupt


def test_a_trial_that_breaks_the_floor_is_stopped_after_that_epoch_and_counted(spec, out, monkeypatch):
    # The original; a trial that dips to just what may still come back; one that does worse; one that does later.
    values = [1.0, 0.64, 0.77, 0.2, 0.63, 0.64, 0.76]
    monkeypatch.setattr(Measure, "utility", lambda self, model: values.pop(0))
    path = spec(methods={"plain": {"init": "lora", "epochs": 3}}, trials=3, utility_floor=0.9)
    result = search(path, SearchSettings(out=str(out)))
    states = [(x["state"], x.get("reason", "")) for x in lines(out)]
    broken = [
        ("stopped", f"utility {after} of the original's after step {step}")
        for after, step in (("0.630", 2), ("0.760", 4))
    ]
    assert states == [("complete", ""), *broken]
    assert not values  # measured after every epoch until it is stopped
    assert (result["methods"]["plain"]["trials"], result["methods"]["plain"]["stopped"]) == (3, 2)


def test_a_stopped_or_diverged_trial_leaves_the_shared_model_too(spec, out, monkeypatch):
    bench = runner(spec(utility_floor=0.9), out)
    before = state_of(bench.bench.model)
    assert bench.measure.original
    monkeypatch.setattr(Measure, "utility", lambda self, model: 0.0)
    result, value = bench.run(Trial("plain", 0, {"lr": 0.01}))
    assert result["state"] == "stopped" and value == 1.9 and state_of(bench.bench.model) == before
    monkeypatch.undo()
    result, _ = bench.run(Trial("plain", 1, {"lr": 0.01, "max_grad_growth": 1.0001, "max_grad_norm": 1e-9}))
    assert result["state"] == "stopped" and "gradient" in result["reason"] and state_of(bench.bench.model) == before


def test_a_model_without_utility_is_refused_for_good(spec, out, monkeypatch):
    monkeypatch.setattr(Measure, "utility", lambda self, model: 0.0)
    with pytest.raises(UsageError, match="its utility is 0, so none can be kept") as refused:
        search(spec(), SearchSettings(out=str(out)))
    assert not getattr(refused.value, "__notes__", ())  # --resume would be refused again


def test_a_trial_that_cannot_be_run_is_stopped_with_its_reason(spec, out, monkeypatch):
    bench = runner(spec(utility_floor=0.9), out)
    before = state_of(bench.bench.model)
    result, value = bench.run(Trial("plain", 0, {"lr": 0.01, "rank": 24}))
    assert result["state"] == "stopped" and "--rank must be in [1, 8]" in result["reason"] and value == 1.9
    bounds = [(ResourceError("train: out of memory with a single row of 9 tokens."), "train: out of memory with a")]
    bounds += [(MemoryError("which?"), "out of memory"), (torch.OutOfMemoryError("CUDA: all of it"), "out of memory")]
    bounds += [(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory")]
    for number, (error, said) in enumerate(bounds):
        with monkeypatch.context() as patch:
            patch.setattr(lora, "_place", lambda *_, error=error: (_ for _ in ()).throw(error))
            result, value = bench.run(Trial("plain", number, {"lr": 0.01}))
        assert result["state"] == "stopped" and result["reason"].startswith(said) and value == 1.9
        assert state_of(bench.bench.model) == before
    assert bench.run(Trial("plain", 5, {"lr": 0.01}))[0]["state"] == "complete"
    monkeypatch.setattr(lora, "_place", lambda *_: (_ for _ in ()).throw(RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        bench.run(Trial("plain", 6, {"lr": 0.01}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranges": {"rank": {"low": 2, "high": 24}}}, "methods: plain: --rank must be in [1, 8]"),
        ({"methods": METHODS | {"wide": {"rank": 24}}}, "methods: wide: --rank must be in [1, 8]"),
        ({"methods": {"a": {"ranges": {"rank": [2, 16], "targets": ["q_proj", "v_proj"]}}}}, "methods: a: --rank"),
        ({"ranges": {"stop": [None, "auto"]}}, "methods: plain: --stop auto: the rows of"),
    ],
    ids=["rank", "method", "layer", "stop"],
)
def test_what_may_be_drawn_must_fit_the_model_and_the_data(spec, out, changes, said):
    with pytest.raises((UsageError, DataError), match=re.escape(said)):
        search(spec(**changes), SearchSettings(out=str(out)))
    assert not out.exists()


def test_methods_below_the_floor_have_no_best_run(spec, out, capsys, monkeypatch):
    path = spec(methods={"plain": {"init": "lora"}}, trials=1)
    values = Measure.values
    monkeypatch.setattr(Measure, "values", lambda self, scores: values(self, scores) | {"share": 0.49})
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["search", str(path), "--out", str(out)]) == 0
    assert list((out / "best").iterdir()) == [] and lines(out)[0]["state"] == "complete"
    assert "none keeps 50% of the utility" in capsys.readouterr().out


@pytest.mark.slow
def test_a_retrained_model_gives_forget_quality_afterwards_and_chooses_nothing(spec, out, tmp_path):
    plain = {"methods": {"plain": {"init": "lora"}}, "trials": 1}
    without = search(spec(**plain), SearchSettings(out=str(tmp_path / "without")))
    model = yaml.safe_load(spec().read_text())["settings"]["model"]
    found = search(spec(**plain, reference=model), SearchSettings(out=str(out)))["methods"]["plain"]
    assert found["forget_quality"]["value"] <= 0 and found["forget_quality"]["n_retrained"] == 6
    assert without["methods"]["plain"]["forget_quality"]["value"] is None
    assert found["chosen"]["scores"] == without["methods"]["plain"]["chosen"]["scores"]
    assert not any("forget_quality" in x["scores"] for x in lines(out))
    resumed = SearchSettings(out=str(tmp_path / "without"), resume=True)
    later = search(spec(**plain, reference=model), resumed)["methods"]["plain"]
    assert later["forget_quality"] == found["forget_quality"]
    other = tiny_llama(seed=7, initializer_range=0.9)
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(model).save_pretrained(tmp_path / "other")
    changed = search(spec(**plain, reference=str(tmp_path / "other")), resumed)["methods"]["plain"]
    assert changed["forget_quality"] != found["forget_quality"]
    evaluation = str(out / "retrained")
    again = search(spec(**plain, reference=evaluation), SearchSettings(out=str(tmp_path / "third")))
    assert again["methods"]["plain"]["forget_quality"] == found["forget_quality"]
    write_rows(tmp_path / "forget.jsonl", [row(i) for i in range(5)])
    with pytest.raises(DataError, match="cannot be compared"):  # before anything is trained or written
        search(spec(**plain, reference=evaluation), SearchSettings(out=str(tmp_path / "fourth")))
    assert not (tmp_path / "fourth").exists()


def test_a_reference_that_is_nowhere_is_refused_before_any_trial(spec, out, tmp_path):
    with pytest.raises(DataError, match=r"^reference: no/such .* cannot be loaded") as found:
        search(spec(reference="no/such"), SearchSettings(out=str(out)))
    assert "--model" not in str(found.value) and not out.exists()


def test_wrong_answers_count_only_where_every_row_brings_some(spec, out, tmp_path):
    own = [row(i) | {"perturbed_answer": ["It is Bob.", "It is Cy."]} for i in range(6)]
    for name, rows, offered in (("all", own, True), ("five", [*own[:5], own[5] | {"perturbed_answer": []}], False)):
        write_rows(tmp_path / "forget.jsonl", rows)
        path = spec(methods={"plain": {"init": "lora"}}, trials=1)
        found = search(path, SearchSettings(out=f"{out}-{name}", trials_only=True))
        assert ("truth_preference" in found["original"]) == offered, found["original"]


def test_running_text_has_no_wrong_answers(spec, out, tmp_path):
    texts = [{"text": " ".join(row(i).values()), "perturbed_answer": ["It is Bob."]} for i in range(6)]
    write_rows(tmp_path / "forget.jsonl", texts)
    path = spec(methods={"plain": {"init": "lora"}}, trials=1)
    found = search(path, SearchSettings(out=str(out), trials_only=True))
    assert "truth_preference" not in found["original"] and found["methods"]["plain"]["trials"] == 1


def test_the_folder_is_one_search_only(spec, out, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "work", lambda *_: None)
    monkeypatch.setattr(command, "finish", lambda *_, **__: {})
    search(spec(), SearchSettings(out=str(out)))
    with pytest.raises(UsageError, match="--resume"):
        search(spec(), SearchSettings(out=str(out)))
    search(spec(), SearchSettings(out=str(out), resume=True))
    with pytest.raises(UsageError, match=r"trials: 2 -> 3"):
        search(spec(trials=3), SearchSettings(out=str(out), resume=True))
    changed = METHODS | {"plain": {"init": "pissa"}}
    with pytest.raises(UsageError, match=r"plain\.init: lora -> pissa"):
        search(spec(methods=changed), SearchSettings(out=str(out), resume=True))
    wrong = [row(i) | {"perturbed_answer": ["It is Bob."]} for i in range(6)]  # the same rows: others to compare with
    write_rows(tmp_path / "forget.jsonl", wrong)
    with pytest.raises(UsageError, match=r"evaluation\.forget tokens"):
        search(spec(), SearchSettings(out=str(out), resume=True))
    write_rows(tmp_path / "held.jsonl", [row(i) for i in range(30, 33)])
    with pytest.raises(UsageError, match=r"evaluation\.retain"):
        search(spec(), SearchSettings(out=str(out), resume=True))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        search(spec(), SearchSettings(out=str(tmp_path / "other"), resume=True))


def test_what_is_wrong_with_the_data_shows_before_there_is_a_folder(spec, out, tmp_path):
    path = spec(evaluation={"suite": "tofu", "data": str(tmp_path), "split": "forget02"})
    with pytest.raises(UsageError, match="forget02"):
        search(path, SearchSettings(out=str(out)))
    assert not out.exists()


def started(spec, out, *flags):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-m", "lorasure", "search", str(spec), "--out", str(out), *flags]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.02)


def test_a_worker_beside_the_first_shows_no_warnings_of_libraries_either(spec, out, monkeypatch, capsys):
    def warn(*_):
        warnings.warn_explicit("is deprecated", FutureWarning, "its.py", 1, module="transformers.modeling_utils")

    for name in ("Runner", "Study", "_share_cores"):
        monkeypatch.setattr(command, name, lambda *_: None)
    monkeypatch.setattr(command, "work", warn)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        command._helper(spec(), out, 1, 2)
    assert not seen and capsys.readouterr().err == ""


def finished(out):
    there = lines(out) if (out / "trials.jsonl").is_file() else []
    return {(x["method"], x["trial"]): x for x in there if x["state"] == "complete"}


def told(process):
    """Which trials a worker and its helpers say that they ran."""
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return [line.split(":")[0] for line in errors.splitlines() if line[:5] in ("plain", "vila-", "fila-")]


@pytest.mark.slow
def test_interrupted_killed_and_continued_no_trial_is_lost_or_repeated(spec, out):
    two = {name: METHODS[name] for name in ("plain", "vila")}
    path = spec(trials=3, methods=two)
    before: dict = {}
    for flags, number, code in (((), signal.SIGINT, 75), (("--resume",), signal.SIGKILL, -9)):
        process, enough = started(path, out, *flags), len(before) + 1
        wait_for(lambda: len(finished(out)) >= enough and any((out / LOCKS).glob("*-*/train.jsonl")), process)  # noqa: B023
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == code
        assert all(finished(out)[key] == before[key] for key in before)
        before = finished(out)
    assert 2 <= len(before) < 6
    ran = told(started(path, out, "--resume", "--workers", "2"))
    after = finished(out)
    assert after.keys() == {(m, i) for m in two for i in range(3)}
    assert all(after[key] == before[key] for key in before)  # times too: none of them ran again
    assert sorted(ran) == sorted(f"{m}-{i:04d}" for m, i in after.keys() - before.keys())


@pytest.mark.slow
def test_two_commands_share_one_search(spec, out, tmp_path):
    alone = search(spec(), SearchSettings(out=str(tmp_path / "alone"), trials_only=True))
    processes = [started(spec(), out, "--resume") for _ in range(2)]
    ran = [told(process) for process in processes]
    assert sorted(ran[0] + ran[1]) == sorted(f"{m}-{i:04d}" for m in METHODS for i in range(2))
    assert len(list((out / IMPORTANCE).iterdir())) == 1
    shared = {(x["method"], x["trial"]): x["params"] for x in lines(out)}
    assert shared == {(x["method"], x["trial"]): x["params"] for x in lines(tmp_path / "alone")}
    result = artifacts.read_json(out / "result.json")
    for name, row in result["methods"].items():
        assert row["chosen"]["params"] == alone["methods"][name]["chosen"]["params"]


def test_the_example_can_be_read(monkeypatch):
    root = Path(__file__).resolve().parents[1]
    monkeypatch.chdir(root)
    for path in sorted((root / "examples" / "search").glob("*.yaml")):
        assert read_spec(path).methods
