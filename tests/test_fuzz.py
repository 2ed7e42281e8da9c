"""The fuzzer itself: a short run of every target finds nothing, it is repeatable, and it sees what it must see."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "reliability"))

import fuzz  # noqa: E402
from fuzz_targets import TARGETS, Target  # noqa: E402

from lorasure.errors import DataError, LorasureError  # noqa: E402


@pytest.mark.fault(
    "mutated files: rows in five formats, settings, manifests, tensors",
    "P8",
    "a documented exit code, one printable line, no text of a row, nothing run; within ten seconds",
    "no ValueError in readers._parquet; no call of _check_configs; no except in Importance.load",
)
@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files(name, injected):
    found = fuzz.fuzz(name, 300, seed=1)
    assert found["failures"] == [] and sum(found["outcomes"].values()) == 300
    assert found["outcomes"].keys() >= {"0", "3"}  # some inputs stay valid, some do not
    injected(300)


def test_the_same_seed_makes_the_same_inputs():
    target = TARGETS["jsonl"]

    def made(seed):
        return [fuzz.mutated(fuzz.random.Random(f"{seed}/{i}"), target.seeds, target.words) for i in range(50)]

    assert made(1) == made(1) != made(2)


class Odd(LorasureError):
    exit_code = 9


def fails(error):
    def run(data, folder, draw):
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (fails(RuntimeError("x")), "RuntimeError at test_fuzz.py"),
        (fails(Odd("x")), "exit code 9"),
        (fails(SystemExit(7)), "exit code 7"),
        (fails(DataError("said quillfeather")), "quotes a row"),
        (lambda *_: time.sleep(3), "TooSlow"),
        (lambda *_: os.system("touch canary"), "a canary file"),
    ],
    ids=["exception", "code", "exit", "text", "slow", "run"],
)
def test_the_fuzzer_sees(monkeypatch, run, expected):
    monkeypatch.setitem(TARGETS, "broken", Target((b"x",), (b"y",), run))
    monkeypatch.setattr(fuzz, "LIMIT", 1)
    assert expected in json.dumps(fuzz.fuzz("broken", 1, seed=0)["failures"])


def test_the_stored_result_is_complete_and_clean():
    if not fuzz.RESULT.exists():
        pytest.skip("benchmarks/reliability/fuzz.py has not been run to its end here")
    stored = json.loads(fuzz.RESULT.read_text())
    assert stored["targets"].keys() == TARGETS.keys() and stored["versions"] and stored["machine"]
    for about in stored["targets"].values():
        assert about["inputs"] >= 200_000 == about["inputs"] - about["inputs"] % 200_000
        assert about["failures"] == [] and sum(about["outcomes"].values()) == about["inputs"]
        assert {int(code) for code in about["outcomes"]} <= fuzz.DOCUMENTED
