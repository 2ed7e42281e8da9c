"""Requests applied one after another: what each starts from, the ledger, going on with it, and MUSE's protocols."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import write_rows
from lorasure import pipeline, purge, sequential
from lorasure.artifacts import read_json, sha256, write_manifest
from lorasure.cli import main
from lorasure.errors import ANEW, GOES_ON, INTERRUPTED, UsageError
from lorasure.evaluate.metrics import Score
from lorasure.evaluate.settings import SequenceSettings
from lorasure.interrupt import Terminated
from lorasure.sequential import came_back, plan
from test_muse import make_muse

Capture = pytest.CaptureFixture[str]
QUICK = ["--lr", "1e-2", "--epochs", "1", "--rank", "2", "--init", "lora"]


@pytest.fixture
def requests(tmp_path: Path) -> list[str]:
    return [
        str(write_rows(tmp_path / f"{name}.jsonl", [{"question": f"Who is {name}{n}?", "answer": f"It is {n}."}]))
        for n, name in enumerate(("ann", "bob", "cid"))
    ]


@pytest.fixture
def flags(tmp_path: Path, model_folder: Path, data_files: tuple[Path, Path]) -> list[str]:
    return ["--model", str(model_folder), "--retain", str(data_files[1]), "--out", str(tmp_path / "out"), *QUICK]


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> tuple[Path, list[str]]:
    """A sequence of one request: its folder, and the arguments but --out."""
    folder = tmp_path_factory.mktemp("applied")
    rows = [{"question": f"Who is {n}?", "answer": f"It is {n}."} for n in range(5)]
    request, kept = write_rows(folder / "a.jsonl", rows[:1]), write_rows(folder / "kept.jsonl", rows[1:])
    given = [str(request), "--model", str(model_folder), "--retain", str(kept), *QUICK]
    assert main(["sequence", *given, "--out", str(folder / "out")]) == 0
    return folder / "out", given


def weights(folder: Path) -> dict[str, str]:
    return {"model.safetensors": sha256(folder / "model.safetensors")}


def bases(out: Path) -> Iterator[dict[str, str]]:
    """Weight files that each request started from."""
    for run in sorted(out.glob("request-*")):
        yield read_json(run / "summary.json")["base"]["files"]


def test_each_request_starts_from_what_the_last_one_left_and_earlier_ones_are_measured_again(
    tmp_path: Path, model_folder: Path, requests: list[str], flags: list[str], capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["sequence", *requests[:2], *flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(bases(out)) == [weights(model_folder), weights(out / "request-1" / "merged")]
    ledger = read_json(out / "ledger.json")
    assert [(r["rows"], r["run"]) for r in ledger["requests"]] == [(1, "request-1"), (1, "request-2")]
    measured = {step: {n for n in scores if n.endswith("probability")} for step, scores in ledger["measured"].items()}
    both = {"request_1_probability", "request_2_probability", "retain_probability"}
    assert measured == {"before": both, "after_1": both - {"request_2_probability"}, "after_2": both}
    assert said["after_2_request_1_probability"] == ledger["measured"]["after_2"]["request_1_probability"]
    summaries = [read_json(out / f"request-{n}" / "summary.json") for n in (1, 2)]
    for step, name, expected in (
        ("before", "request_1", summaries[0]["before"]["forget"]),
        ("after_1", "request_1", summaries[0]["after"]["forget"]),
        ("after_2", "request_2", summaries[1]["after"]["forget"]),
    ):  # reference: what the runs themselves measured
        assert said[f"{step}_{name}_probability"]["value"] == pytest.approx(expected["value"], rel=1e-4)
    assert said["after_2_request_1_probability"]["value"] != said["after_1_request_1_probability"]["value"]
    assert "Who is" not in (out / "ledger.json").read_text()


def test_a_new_request_goes_on_top_and_other_orders_are_refused(
    tmp_path: Path, requests: list[str], flags: list[str], capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["sequence", requests[0], *flags]) == 0
    first = {p: p.stat().st_mtime_ns for p in (out / "request-1").rglob("*")}
    capsys.readouterr()
    assert main(["sequence", *requests[:2], *flags, "--json"]) == 0
    said = list(dict.fromkeys(name.split("_re")[0] for name in json.loads(capsys.readouterr().out)))
    assert said == ["before", "after_1", "after_2"]
    assert {p: p.stat().st_mtime_ns for p in (out / "request-1").rglob("*")} == first
    assert list(bases(out))[1] == weights(out / "request-1" / "merged")
    assert "request_2_probability" in read_json(out / "ledger.json")["measured"]["before"]
    for given, message in (
        (requests[1::-1], "request-1 holds another request than"),
        (requests[:1], "holds more than 1 requests; give all of them"),
    ):
        assert main(["sequence", *given, *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


def test_stopped_between_two_runs_it_says_what_is_kept(
    applied: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    """The same command goes on with what was applied, but for one that replaces it; before a run nothing is left."""
    out = shutil.copytree(applied[0], tmp_path / "out")
    given = ["sequence", *applied[1], "--out", str(out)]
    ledger = (out / "ledger.json").rename(tmp_path / "ledger.json")

    def stopped(*_: object) -> None:
        raise Terminated

    with monkeypatch.context() as patch:
        patch.setattr(sequential, "_scores", stopped)
        assert main(given) == INTERRUPTED
        assert capsys.readouterr().err.endswith(f"lorasure: interrupted. {GOES_ON}\n")
        shutil.copy(ledger, out)
        assert main([*given, "--overwrite"]) == 143
        assert capsys.readouterr().err.endswith(f"lorasure: interrupted. {ANEW}\n")
        assert not read_json(out / "ledger.json")["measured"]  # the runs that it was about are gone
        patch.setattr(pipeline, "forget", stopped)
        assert main([*given, "--out", str(tmp_path / "new")]) == 143
        assert capsys.readouterr().err.endswith("lorasure: interrupted. Nothing was written.\n")
    made = (out / "request-1" / "summary.json").stat().st_mtime_ns
    assert main(given) == 0 and (out / "request-1" / "summary.json").stat().st_mtime_ns == made
    purge.purge(out / "request-1")
    assert main(given) == 3  # nor would the same command go on after that
    assert "there is no data.json" in (said := capsys.readouterr().err) and GOES_ON not in said


def test_all_steps_are_measured_on_the_same_rows_to_keep(
    tmp_path: Path, requests: list[str], flags: list[str], capsys: Capture
) -> None:
    out, said = tmp_path / "out", "every step is measured again"
    assert main(["sequence", requests[0], *flags]) == 0
    first, began = read_json(out / "ledger.json")["measured"], (out / "request-1" / "summary.json").stat().st_mtime_ns
    fewer = write_rows(tmp_path / "fewer.jsonl", [{"question": "Who keeps?", "answer": "I do."}])
    assert main(["sequence", *requests[:2], *flags, "--lr", "5e-3"]) == 0  # another rate is the new request's own
    assert said not in capsys.readouterr().err
    measured = read_json(out / "ledger.json")["measured"]
    assert measured["after_1"] == first["after_1"]
    assert main(["sequence", *requests[:2], *flags, "--retain", str(fewer)]) == 0
    assert said in capsys.readouterr().err
    again = read_json(out / "ledger.json")["measured"]
    assert {step: scores["retain_probability"]["n"] for step, scores in again.items()} == dict.fromkeys(again, 1)
    assert again.keys() == {"before", "after_1", "after_2"}
    for step, scores in again.items():
        assert scores["request_1_probability"] == measured[step]["request_1_probability"]
    assert (out / "request-1" / "summary.json").stat().st_mtime_ns == began
    assert main(["sequence", *requests[:2], *flags, "--retain", str(fewer), "--template", "tofu-llama2"]) == 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ledger.json", "[]"),
        ("ledger.json", '{"measured": {"before": 3}}'),
        ("ledger.json", '{"measured": {"before": {"retain_probability": {}}}}'),
        ("request-1/data.json", '{"forget": 3}'),
        ("request-1/summary.json", '{"base": []}'),
    ],
)
def test_accounts_of_another_program_are_refused(
    tmp_path: Path, applied: tuple[Path, list[str]], capsys: Capture, name: str, content: str
) -> None:
    out = Path(shutil.copytree(applied[0], tmp_path / "out"))
    (out / name).write_text(content)
    write_manifest(out / "request-1")
    assert main(["sequence", *applied[1], "--out", str(out)]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not what this program writes there" in error


def test_a_run_made_from_another_model_is_refused(
    tmp_path: Path, requests: list[str], flags: list[str], capsys: Capture
) -> None:
    assert main(["sequence", *requests[:2], *flags]) == 0
    changed = tmp_path / "out" / "request-1" / "merged" / "model.safetensors"
    changed.write_bytes(changed.read_bytes()[:-4] + b"\0\0\1\1")
    assert main(["sequence", *requests[:2], *flags]) == 2
    assert "request-2 was made from another model than" in capsys.readouterr().err


def test_a_failing_request_leaves_the_ones_before_it(
    tmp_path: Path, requests: list[str], flags: list[str], data_files: tuple[Path, Path], capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["sequence", requests[0], *flags, "--rank", "999"]) == 2
    assert not out.exists()
    assert main(["sequence", requests[0], str(data_files[1]), *flags]) == 3
    assert "are the same row" in capsys.readouterr().err and not out.exists()
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    assert main(["sequence", requests[0], *flags]) == 2
    assert "holds no ledger.json" in capsys.readouterr().err and [p.name for p in out.iterdir()] == ["letter.txt"]


def test_an_interrupted_request_goes_on(
    tmp_path: Path, requests: list[str], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: object) -> None:
        given[-1]()  # the training
        raise KeyboardInterrupt

    def not_again(*_: object) -> None:
        raise AssertionError("training was over")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("lorasure.pipeline.export", stop)
        assert main(["sequence", requests[0], *flags]) == INTERRUPTED
    assert not (out / "request-1").exists()
    with monkeypatch.context() as patch:
        patch.setattr("lorasure.pipeline.train_adapter", not_again)
        assert main(["sequence", requests[0], *flags, "--resume"]) == 0
    assert list(read_json(out / "ledger.json")["measured"]) == ["after_1", "before"]
    assert main(["sequence", *requests[1::-1], *flags, "--overwrite", "--resume"]) == 0
    assert Path(read_json(out / "ledger.json")["requests"][0]["source"]).stem == "bob"
    assert list(bases(out))[1] == weights(out / "request-1" / "merged")


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["sust", "scal"])
def test_muse_s_protocols(tmp_path: Path, model_folder: Path, protocol: str, capsys: Capture) -> None:
    data, out = make_muse(tmp_path / "news"), tmp_path / "out"
    command = ["sequence", str(data), "--protocol", protocol, "--model", str(model_folder), "--out", str(out)]
    retain = write_rows(tmp_path / "keep.jsonl", [{"text": f"Kept {i}. " * 9} for i in range(4)])
    own = ["--retain", str(retain), "--init", "fila", "--split", "published"] if protocol == "scal" else []
    assert main([*command, *QUICK, *own]) == 0
    chain = [weights(model_folder)] * 4
    if protocol == "sust":
        chain[1:] = [weights(out / f"request-{n}" / "merged") for n in (1, 2, 3)]
    assert list(bases(out)) == chain
    ledger = read_json(out / "ledger.json")
    assert [r["rows"] for r in ledger["requests"]] == ([2] * 4 if protocol == "sust" else [2, 4, 6, 8])
    assert [Path(r["source"]).name for r in ledger["requests"]] == [f"forget_{n}.jsonl" for n in (1, 2, 3, 4)]
    for step in ("before", "after_1", "after_4"):
        stored = read_json(out / f"muse_{step}" / "scores.json")
        assert {name: ledger["measured"][step][name] for name in stored} == stored
    assert "knowmem_retain" in capsys.readouterr().out


def test_a_request_that_comes_back_is_named() -> None:
    def scores(*values: float) -> dict[str, Score]:
        return {f"request_{n}_probability": Score(v, 9, v - 0.1, v + 0.1) for n, v in enumerate(values, 1)}

    measured = {"before": scores(0.9, 0.9, 0.9), "after_1": scores(0.2), "after_2": scores(0.3, 0.2)}
    assert came_back(measured) == []
    measured["after_3"] = scores(0.2, 0.5, 0.2)
    assert came_back(measured) == ["Request 2 came back after request 3: 0.200 -> 0.500."]


def test_what_is_asked_for(tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": "m", "out": str(tmp_path)}
    with pytest.raises(UsageError, match="--retain"):
        plan([Path("a.jsonl")], SequenceSettings(**given))
    with pytest.raises(UsageError, match=r"--protocol 'sus'\. Did you mean 'sust'"):
        plan([Path("a")], SequenceSettings(**given, protocol="sus"))
    with pytest.raises(UsageError, match="one place, MUSE's data, got 2"):
        plan([Path("a"), Path("b")], SequenceSettings(**given, protocol="scal"))
    hub = plan([Path("muse-bench/MUSE-News")], SequenceSettings(**given, protocol="scal"))
    assert hub.requests[3] == "muse-bench/MUSE-News:scal:forget_4" and not hub.chained
    assert hub.retain == "muse-bench/MUSE-News:raw:retain1"
