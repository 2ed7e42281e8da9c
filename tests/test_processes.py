"""Two processes on one machine give what one gives, up to the order of summation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorasure import artifacts

LAUNCH = {
    1: ["-m", "lorasure"],
    2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lorasure"],
}


def launched(count: int, *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCH[count], *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--init", "vila"],
        ["--init", "reglu", "--loss", "npo", "--retain-loss", "kl", "--targets", "layers.1.*"],  # from a cached prefix
    ],
    ids=str,
)
def test_two_processes_give_the_run_of_one(
    tmp_path: Path, model_folder: Path, data_files: tuple[Path, Path], options: list[str]
) -> None:
    given = ["--model", model_folder, "--forget", data_files[0], "--retain", data_files[1], *options]
    given += ["--epochs", 2, "--batch-size", 3, "--lr", "1e-2", "--tokens-per-batch", 64]
    for count in LAUNCH:
        done = launched(count, "forget", *given, "--out", tmp_path / str(count))
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("adapter:") == 1  # only the first process talks
    for name in (artifacts.IMPORTANCE, artifacts.START, artifacts.TRAINED):
        files = [tmp_path / str(count) / name for count in LAUNCH]
        if not files[0].exists():
            continue
        one, two = (artifacts.read_tensors(file)[0] for file in files)
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-5)
    logs = [[json.loads(line) for line in (tmp_path / str(n) / "train.jsonl").read_text().splitlines()] for n in LAUNCH]
    for a, b in zip(*logs, strict=True):
        assert a["forget"] == pytest.approx(b["forget"], rel=1e-5) and a["tokens"] == b["tokens"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["1", "2"]  # nothing of the second process


@pytest.mark.slow
def test_resuming_wants_one_process(tmp_path: Path, model_folder: Path, data_files: tuple[Path, Path]) -> None:
    given = ["--model", model_folder, "--forget", data_files[0], "--retain", data_files[1], "--resume"]
    done = launched(2, "forget", *given, "--out", tmp_path / "run")
    assert done.returncode != 0 and "--resume goes on in one process" in done.stderr
