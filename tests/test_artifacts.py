"""Files of a run: whole or not at all, and every change to them is seen."""

from __future__ import annotations

import json

import pytest
import torch

from lorasure import artifacts
from lorasure.errors import DataError


def make(folder, text="one"):
    artifacts.write_text(folder / "a.txt", text)
    artifacts.write_text(folder / "deep" / "b.txt", text)
    artifacts.write_manifest(folder)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"a": 1})
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            artifacts.write_json(path, bad)
    assert artifacts.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_tensors_come_back_with_what_is_known_about_them(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    tensors = {"a": shared, "same": shared, "turned": shared.T, "whole": torch.tensor(3)}
    artifacts.write_tensors(tmp_path / "t.safetensors", tensors, {"unit": "nats"})
    found, about = artifacts.read_tensors(tmp_path / "t.safetensors")
    assert about == {"unit": "nats"} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff" * 64, b"\xff\xff\xff\xff\x17\x00\x00\x00{}", b"\x80\x04pickle"])
def test_damaged_files_are_data_errors(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(DataError, match="file"):
        artifacts.read_tensors(path)
    with pytest.raises(DataError, match="file"):
        artifacts.read_json(path)


def test_check_run_sees_every_change(tmp_path):
    run = tmp_path / "run"
    make(run)
    with pytest.raises(DataError, match=r"there is no c\.txt: its stage"):
        artifacts.check_run(run, "c.txt")
    (run / "a.txt").write_text("0ne")
    with pytest.raises(DataError, match="changed after it was written"):
        artifacts.check_run(run, "a.txt")
    for manifest in ([], {"files": 3}, {}):
        (run / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="not a run folder"):
            artifacts.check_run(run)
