"""Files of a run: whole or not at all, private, verified, and never at the cost of what was there before."""

from __future__ import annotations

import json
import os

import pytest
import torch

from lorasure import artifacts
from lorasure.errors import DataError, UsageError


class Stop(Exception):
    pass


def make(folder, text="one"):
    with artifacts.new_folder(folder, overwrite=True) as partial:
        artifacts.write_text(partial / "a.txt", text)
        artifacts.write_text(partial / "deep" / "b.txt", text)


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_new_folder_is_private_and_verified(tmp_path):
    make(tmp_path / "x" / "run")
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "x" / "run").rglob("*.*")} == {"0o600"}
    assert (tmp_path / "x" / "run").stat().st_mode & 0o777 == 0o700
    artifacts.check_run(tmp_path / "x" / "run", "a.txt", "deep/b.txt")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["run"]


def test_a_failure_leaves_nothing_not_even_parents(tmp_path):
    with pytest.raises(Stop), artifacts.new_folder(tmp_path / "x" / "y" / "run") as partial:
        artifacts.write_text(partial / "a.txt", "a")
        raise Stop
    assert not list(tmp_path.iterdir())


def test_a_failure_while_overwriting_keeps_the_old_folder(tmp_path, monkeypatch):
    make(tmp_path / "run")
    before = content(tmp_path)
    with pytest.raises(Stop), artifacts.new_folder(tmp_path / "run", overwrite=True):
        raise Stop
    rename = type(tmp_path).rename

    def failing(self, target):
        if ".partial-" in self.name:
            raise OSError("no rename")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(OSError, match="no rename"):
        make(tmp_path / "run", "two")
    assert content(tmp_path) == before
    monkeypatch.undo()
    make(tmp_path / "run", "two")
    assert (tmp_path / "run" / "a.txt").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_only_our_own_folders_are_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    make(tmp_path / "home")  # empty: fine
    with pytest.raises(UsageError, match="not empty"):
        artifacts.check_new(tmp_path / "home")
    (tmp_path / "home" / "manifest.json").unlink()
    with pytest.raises(UsageError, match="replaces earlier runs only"):
        make(tmp_path / "home")
    assert (tmp_path / "home" / "a.txt").exists()


def test_a_symbolic_link_as_out_replaces_its_target(tmp_path):
    make(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make(tmp_path / "link", "two")
    assert (tmp_path / "real" / "a.txt").read_text() == "two" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("links", [True, False])
def test_changed_run_keeps_what_is_named_and_drops_the_rest(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    run = tmp_path / "run"
    with artifacts.new_folder(run) as partial:
        for name in ("kept", "dropped"):
            artifacts.write_text(partial / name, "old")
    before = content(run)
    with pytest.raises(Stop), artifacts.changed_run(run, ["kept"]) as changed:
        artifacts.write_text(changed / "kept", "new")
        raise Stop
    assert content(run) == before
    with artifacts.changed_run(run, ["kept", "absent"]) as changed:
        artifacts.write_text(changed / "added", "new")
    artifacts.check_run(run, "kept", "added")
    assert sorted(p.name for p in run.iterdir()) == ["added", "kept", "manifest.json"]


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
    with pytest.raises(DataError, match=r"there is no c\.txt yet"):
        artifacts.check_run(run, "c.txt")
    (run / "a.txt").write_text("0ne")
    with pytest.raises(DataError, match="changed after it was written"):
        artifacts.check_run(run, "a.txt")
    for manifest in ([], {"files": 3}, {}):
        (run / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="not a run folder"):
            artifacts.check_run(run)
