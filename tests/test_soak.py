"""The soak of `make soak`, short: three random kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "benchmarks" / "reliability" / "soak.py"


@pytest.mark.slow
@pytest.mark.fault(
    "SIGKILL at random moments of one run, continued after each",
    "P2",
    "it ends in the undisturbed run's adapter, bit by bit",
    "train.py: restore without the optimizer's moments",
)
def test_random_kills(tmp_path, injected):
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SOAK), "--kills", "3", "--epochs", "4", "--rows", "16", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["equal"] and sum(found["killed_in"].values()) == 3
    injected(3)
