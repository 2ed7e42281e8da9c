"""Run folders: whole or not at all, private, one process at a time, and what was interrupted can be continued."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from lorasure import artifacts, folders
from lorasure.errors import KEPT, KEPT_TO_CHANGE, DataError, NumericError, ResourceError, UsageError


class Stop(Exception):
    pass


def make(folder, text="one"):
    with folders.new_folder(folder, overwrite=True) as partial:
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


def test_a_file_of_its_own_changes_nothing_that_is_read_or_finished(tmp_path):
    make(tmp_path / "run")
    artifacts.write_json(tmp_path / "manifest.json", {"name": "another program's"})
    for name in ("log.json", "read/log.json", "mine.json"):
        artifacts.write_text(tmp_path / name, "{}")
    reads = [tmp_path / "log.json", tmp_path / "read"]
    for name in ("log.json", "read/log.json", "read/new.json", "run/a.txt", "run/new.txt", "run/deep/b.txt", "run"):
        with pytest.raises(UsageError, match=f"^--out {tmp_path / name}: .* is read, or finished, and stays as it is"):
            folders.check_new_file(tmp_path / name, "--out", overwrite=True, reads=reads)
    folders.check_new_file(tmp_path / "mine.json", "--out", overwrite=True, reads=reads)
    folders.check_new_file(tmp_path / "new.json", "--out", overwrite=False, reads=reads)
    with pytest.raises(UsageError, match="add --overwrite"):
        folders.check_new_file(tmp_path / "mine.json", "--out", overwrite=False, reads=reads)


def test_nothing_new_is_put_into_what_is_finished(tmp_path):
    make(tmp_path / "run")
    make(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "run" / "deep" / "old")  # what got there all the same can be changed
    folders.check_new(tmp_path / "run" / "deep" / "old", overwrite=True)
    (tmp_path / "run" / "empty").mkdir()
    for out in ("run/new", "run/deep/new", "run/empty", "run/deep/old/new"):
        said = rf"^--out {tmp_path / out}: {tmp_path}/run(/deep/old)? is finished, and stays as it is"
        with pytest.raises(UsageError, match=said):
            folders.check_new(tmp_path / out)
        with pytest.raises(UsageError, match=said):
            make(tmp_path / out)
    make(tmp_path / "open")
    artifacts.begin(tmp_path / "open")
    make(tmp_path / "open" / "run")


def test_what_a_killed_command_leaves_of_a_folder_without_an_identity_is_ours(tmp_path):
    out, partial = tmp_path / "run", tmp_path / ".run.partial"
    make(out)
    for kept in ([], ["a.txt"]):
        with folders.changed_run(out, kept):
            artifacts.write_text(partial / "c.txt", "c")
            shutil.copytree(partial, tmp_path / "left")
        (tmp_path / "left").rename(partial)
        make(out)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("what", ["old", "partial"])
@pytest.mark.parametrize("name", ["x", "x.json", "deep/manifest.json", None])
def test_what_is_not_ours_is_never_removed(tmp_path, what, name):
    out, theirs = tmp_path / "run", tmp_path / f".run.{what}"
    make(out)
    if name:
        artifacts.write_text(theirs / name, "mine")
    else:
        make(tmp_path / "elsewhere")
        theirs.symlink_to(tmp_path / "elsewhere")
    before = content(tmp_path) | content(theirs)
    folders.verify(out)
    for action in (make, lambda out: begin(out, overwrite=True), lambda out: folders.check_new(out, overwrite=True)):
        with pytest.raises(UsageError, match=rf"^--out {out}: {theirs} is in the way, and not this program's"):
            action(out)
    out.rename(tmp_path / "kept")
    with pytest.raises(UsageError, match="in the way"):
        make(out)
    assert not out.exists()
    (tmp_path / "kept").rename(out)
    assert content(tmp_path) | content(theirs) == before


def test_a_failure_leaves_nothing_not_even_parents(tmp_path):
    with pytest.raises(Stop), folders.new_folder(tmp_path / "x" / "y" / "run") as partial:
        artifacts.write_text(partial / "a.txt", "a")
        raise Stop
    assert not list(tmp_path.iterdir())


def test_a_failure_while_overwriting_keeps_the_old_folder(tmp_path, monkeypatch):
    make(tmp_path / "run")
    before = content(tmp_path)
    with pytest.raises(Stop), folders.new_folder(tmp_path / "run", overwrite=True):
        raise Stop
    rename = type(tmp_path).rename

    def failing(self, target):
        if self.name.endswith(".partial"):
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
        folders.check_new(tmp_path / "home")
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
    with folders.new_folder(run) as partial:
        for name in ("kept", "dropped"):
            artifacts.write_text(partial / name, "old")
    before = content(run)
    with pytest.raises(Stop), folders.changed_run(run, ["kept"]) as changed:
        artifacts.write_text(changed / "kept", "new")
        raise Stop
    assert content(run) == before
    with folders.changed_run(run, ["kept", "absent"]) as changed:
        artifacts.write_text(changed / "added", "new")
    artifacts.check_run(run, "kept", "added")
    assert sorted(p.name for p in run.iterdir()) == ["added", "kept", "manifest.json"]


# --- what an interruption leaves --------------------------------------------------------------------------------------

IDENTITY = {"rank": 8, "forget rows": "abc"}


def begin(out, error=None, name="half.txt", **options):
    """One attempt at a folder that is complete with two files; `error` interrupts it after the first."""
    with folders.resumable_folder(out, options.pop("identity", IDENTITY), **options) as partial:
        seen = sorted(p.name for p in partial.iterdir() if p.name != artifacts.MANIFEST)
        artifacts.write_text(partial / name, "half")
        if error:
            raise error
        artifacts.write_text(partial / "whole.txt", "whole")
    return seen


def interrupt(out, error=KeyboardInterrupt, **options):
    with pytest.raises(error) as caught:
        begin(out, error(), **options)
    return caught.value


@pytest.mark.parametrize("error", [KeyboardInterrupt, ResourceError, NumericError, DataError, OSError, Stop])
def test_an_interrupted_folder_is_kept_and_continued(tmp_path, error):
    out, notes = tmp_path / "run", []
    assert "--resume continues" in " ".join(interrupt(out, error).__notes__)
    partial = folders.partial_of(out)
    assert partial.name == ".run.partial" and partial.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in tmp_path.iterdir()] == [".run.partial"]
    with pytest.raises(
        UsageError, match="with --resume on the command that began it, or throw it away with --overwrite"
    ):
        begin(out)
    assert begin(out, resume=True, note=notes.append) == ["half.txt", "identity.json"] and notes == []
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and artifacts.differences(out) == []


def test_a_usage_error_and_a_folder_without_progress_leave_nothing(tmp_path):
    assert not hasattr(interrupt(tmp_path / "deep" / "run", UsageError), "__notes__")
    interrupt(tmp_path / "run", name=artifacts.CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_usage_error_does_not_cost_what_an_earlier_attempt_had(tmp_path):
    interrupt(tmp_path / "run")
    interrupt(tmp_path / "run", UsageError, resume=True)
    assert (tmp_path / ".run.partial" / "half.txt").exists()


def test_what_a_killed_process_had_only_begun_is_cleaned_silently(tmp_path):
    partial = tmp_path / ".run.partial"
    for name in ("identity.json", "config.yaml", ".half.txt.partial-123"):
        artifacts.write_text(partial / name, "{}")
    assert begin(tmp_path / "run") == ["identity.json"]
    artifacts.begin(partial)
    artifacts.write_text(partial / "no identity.txt", "x")
    assert begin(tmp_path / "run", overwrite=True) == ["identity.json"]
    interrupt(tmp_path / "other")
    (tmp_path / ".other.partial" / ".x.partial-77").mkdir()
    artifacts.write_text(tmp_path / ".other.partial" / ".y.partial-77", "half a line")
    assert begin(tmp_path / "other", resume=True) == ["half.txt", "identity.json"]


def test_overwrite_starts_anew_and_resume_needs_something(tmp_path):
    out, notes = tmp_path / "run", []
    interrupt(out)
    assert begin(out, overwrite=True) == ["identity.json"]
    with pytest.raises(UsageError, match="complete, there is nothing to resume"):
        begin(out, resume=True)
    assert begin(tmp_path / "new", resume=True, note=notes.append) == ["identity.json"]
    assert len(notes) == 1 and "nothing is there to resume" in notes[0]


def test_what_is_read_is_never_replaced(tmp_path):
    """A model or a run, or one that holds it; what lies beside it or above may be anywhere."""
    make(tmp_path / "run")
    for reads in (tmp_path / "run", tmp_path / "run" / "deep", tmp_path / "run" / "deep" / ".." / "a.txt"):
        with pytest.raises(UsageError, match=r"--overwrite would delete what is read, --model .*run"):
            folders.check_new(tmp_path / "run", overwrite=True, reads={"--model": str(reads)})
    for reads in (tmp_path, tmp_path / "run2", "hub/run"):
        folders.check_new(tmp_path / "run", overwrite=True, reads={"--model": str(reads)})


def test_what_another_kind_of_command_made_is_never_replaced(tmp_path):
    make(tmp_path / "run")
    folders.check_new(tmp_path / "run", overwrite=True, mark="a.txt")
    with pytest.raises(UsageError, match=r"another kind of command made it \(there is no evaluation\.json\)"):
        folders.check_new(tmp_path / "run", overwrite=True, mark="evaluation.json")


@pytest.mark.parametrize(("error", "note"), [(NumericError, KEPT_TO_CHANGE), (ResourceError, KEPT)])
def test_what_would_fail_again_is_not_said_to_go_on(tmp_path, error, note):
    with pytest.raises(error) as found, folders.resumable_folder(tmp_path / "run", {"lr": 1}) as partial:
        artifacts.write_text(partial / "half.txt", "x")
        raise error("lost")
    assert found.value.__notes__ == [note]


def test_a_replacement_that_was_interrupted_keeps_the_old_run_and_its_permission(tmp_path):
    out = tmp_path / "run"
    make(out)
    before = content(out)
    interrupt(out, overwrite=True)
    assert content(out) == before
    begin(out, resume=True)
    assert (out / "whole.txt").exists() and not (out / "a.txt").exists()
    interrupt(tmp_path / "late")
    make(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "late")  # somebody else's run, meanwhile
    with pytest.raises(UsageError, match="not empty"):
        begin(tmp_path / "late", resume=True)


def test_another_identity_is_refused_with_every_difference(tmp_path):
    out = tmp_path / "run"
    interrupt(out)
    other = {"rank": 4, "forget rows": "xyz", "new": 1}
    with pytest.raises(UsageError) as caught:
        begin(out, resume=True, identity=other, allow_change=[])
    for said in ("rank: 8 -> 4", "forget rows: abc -> xyz", "new: None -> 1", "--allow-change forget rows,rank,new"):
        assert said in str(caught.value)
    with pytest.raises(UsageError, match=r"start anew with --overwrite[.]$"):  # of a command without that flag
        begin(out, resume=True, identity=other)
    with pytest.raises(UsageError, match="rank: 8 -> 4") as caught:
        begin(out, resume=True, identity=other, allow_change=["new", "forget rows"])
    assert "abc" not in str(caught.value)
    with pytest.raises(UsageError, match="Did you mean 'rank'"):
        begin(out, resume=True, allow_change=["rnk"])
    interrupt(out, resume=True, identity=IDENTITY | {"rank": 4}, allow_change=["rank"])
    begin(out, resume=True, identity=IDENTITY | {"rank": 4})
    stored = artifacts.read_json(out / "identity.json")
    assert stored["changed"] == [{"key": "rank", "from": 8, "to": 4}]
    assert stored["identity"] == IDENTITY | {"rank": 4}


def child(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


HOLD = """
import sys, time
from pathlib import Path
from lorasure import folders
with folders.resumable_folder(Path(sys.argv[1]), {"rank": 8, "forget rows": "abc"}) as partial:
    (partial / "half.txt").write_text("half")
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.mark.fault(
    "two processes on one folder", "P1", "the second is refused and changes nothing", "folders.py: no flock"
)
def test_two_processes_on_one_folder(tmp_path, injected):
    out = tmp_path / "run"
    process = child(HOLD, out)
    assert process.stdout.readline() == "in\n"
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ResourceError, match=r"run: another process is working on this folder"):
            begin(out, **options)
        with pytest.raises(ResourceError, match="another process"):
            folders.check_new(out, **options)
    assert (tmp_path / ".run.partial" / "half.txt").exists()
    process.kill()
    process.communicate()
    assert begin(out, resume=True) == ["half.txt", "identity.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    injected(6)


# --- killed at every write --------------------------------------------------------------------------------------------

KILLED = """
import itertools, json, os, shutil, sys
from pathlib import Path
from lorasure import artifacts, folders

out = Path(sys.argv[1])
os.fsync = lambda descriptor: None  # a killed process loses nothing that the kernel has
versions = artifacts.versions()
artifacts.versions = lambda: versions  # to look them up would be half of the time
calls = ("fsync", "replace", "rename", "mkdir", "unlink", "link", "open", "chmod", "rmdir", "close")

def save(folder, text, **options):
    with folders.resumable_folder(folder, {"rank": 8}, **options) as partial:
        artifacts.write_text(partial / "a.txt", text)
        if not (partial / "deep").exists():
            with artifacts.sealed_folder(partial / "deep") as deep:
                artifacts.write_text(deep / "b.txt", text)

def killed_at(last, how):
    "Save in a child process that ends at its last-th call."
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    count = itertools.count(1)
    def counted(function):
        def wrapper(*args, **options):
            if next(count) == last:
                os._exit(9)
            return function(*args, **options)
        return wrapper
    for name in calls:
        setattr(os, name, counted(getattr(os, name)))
    save(out, "new", **how)
    os._exit(0)

for how in ({"overwrite": True}, {"overwrite": True, "resume": True}):
    for last in itertools.count(1):
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        save(out, "old")
        if "resume" in how:
            try:
                with folders.resumable_folder(out, {"rank": 8}, overwrite=True) as partial:
                    artifacts.write_text(partial / "half.txt", "half")
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                pass
        done = killed_at(last, how)
        with folders.locked(out):
            pass
        deep = folders.partial_of(out) / "deep"
        found = {
            "done": done,
            "differences": artifacts.differences(out),
            "checkpoint": artifacts.differences(deep) if deep.exists() else [],
            "text": (out / "a.txt").read_text(),
        }
        save(out, "new", resume=folders.holds_progress(folders.partial_of(out)), overwrite=True)
        found["after"] = (out / "a.txt").read_text()
        found["left"] = [p.name for p in out.parent.iterdir()]
        print(json.dumps(found))
        if done:
            break
"""


@pytest.mark.fault(
    "killed at every call that changes the disk, while a run is saved over an earlier one",
    "P1",
    "the earlier run or the new one verifies; the next start cleans up",
    "folders.py: _settle does not bring the old run back; artifacts.py: sealed_folder writes in place",
)
def test_killed_at_every_write_of_a_save(tmp_path, injected):
    """Each call that changes the disk is the last one of a process that replaces a run. Then: start again."""
    process = child(KILLED, tmp_path / "runs" / "run")
    outcomes = [json.loads(line) for line in process.communicate()[0].splitlines()]
    assert process.returncode == 0 and len(outcomes) > 100
    assert [o["text"] for o in outcomes if o["done"]] == ["new", "new"]
    for outcome in outcomes:
        assert outcome["differences"] == outcome["checkpoint"] == []
        assert outcome["text"] in ("old", "new") and outcome["after"] == "new" and outcome["left"] == ["run"]
    assert {"old", "new"} == {o["text"] for o in outcomes if not o["done"]}
    injected(len(outcomes) - 2)


@pytest.mark.fault(
    "no space, no permission, read-only or failing disk at every write of a save",
    "P1",
    "the earlier run is untouched",
    "folders.py: _swap deletes the old run first",
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_at_every_write(tmp_path, monkeypatch, number, injected):
    out, at = tmp_path / "run", 0
    make(out, "old")
    while True:
        at += 1
        calls = []

        def failing(function, at=at, calls=calls):
            def wrapper(*args, **options):
                calls.append(1)
                if len(calls) >= at:
                    raise OSError(number, os.strerror(number), "a disk")
                return function(*args, **options)

            return wrapper

        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "replace"):
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                begin(out, overwrite=True)
            except OSError as error:
                assert error.errno == number
        with folders.locked(out):
            pass
        assert artifacts.differences(out) == []
        if (out / "whole.txt").exists():
            break
        assert (out / "a.txt").read_text() == "old"
    assert at > 10
    injected(at - 1)
