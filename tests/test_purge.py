"""`verify` names every file that is not as it was written; `purge` leaves no text and no hash of a row."""

from __future__ import annotations

import pytest

from lorasure import artifacts, cli, folders, pipeline, purge
from lorasure.config import ForgetSettings
from lorasure.errors import DataError


@pytest.fixture
def run(model_folder, data_files, tmp_path):
    forget, retain = map(str, data_files)
    common = {
        "model": str(model_folder),
        "forget": forget,
        "retain": retain,
        "rank": 2,
        "epochs": 1,
        "merge": True,
        "init": "vila",
    }
    return pipeline.forget(ForgetSettings(**common, out=str(tmp_path / "run"))).folder


def test_verify_names_every_difference(run, capfd):
    assert cli.main(["verify", str(run)]) == 0
    assert "every file is as it was written" in capfd.readouterr().out
    (run / "train.jsonl").unlink()
    (run / "adapter" / "extra.bin").write_bytes(b"x")
    data = bytearray((run / "trained.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "trained.safetensors").write_bytes(data)
    assert cli.main(["verify", str(run)]) == 3
    said = capfd.readouterr().err
    for part in ("adapter/extra.bin extra", "train.jsonl missing", "trained.safetensors changed"):
        assert part in said
    assert len(said.strip().splitlines()) == 1
    assert cli.main(["verify", str(run.parent)]) == 3


def test_a_run_whose_replacement_was_killed_between_two_renames_is_found(run):
    run.rename(run.parent / ".run.old")
    assert cli.main(["verify", str(run)]) == 0
    run.rename(run.parent / ".run.old")
    assert cli.main(["export", str(run), "--export-rank", "2"]) == 0
    assert [p.name for p in run.parent.iterdir() if "run" in p.name] == ["run"]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_leaves_its_folder_is_refused(run, name):
    artifacts.write_json(run / "manifest.json", {"files": {name: {"sha256": "0", "bytes": 1}}})
    with pytest.raises(DataError, match="not one of ours"):
        artifacts.differences(run)


def test_purge_leaves_the_adapter_and_the_scores_and_no_hash(run, tmp_path, capfd):
    hashes = purge._row_hashes(run)
    kept = {p: p.read_bytes() for p in (run / "adapter").iterdir() if p.suffix != ".md"}
    before = artifacts.read_json(run / "summary.json")
    secrets = [*hashes, "It is person"]
    assert len(hashes) == 4 and any(value in (run / "adapter" / "README.md").read_text() for value in hashes)
    assert cli.main(["purge", str(run)]) == 0
    said = capfd.readouterr().out
    gone = ("data.json", "identity.json", "importance.safetensors", "init.safetensors", "trained.safetensors")
    assert all(name in said and not (run / name).exists() for name in gone)
    for path in [p for p in run.rglob("*") if p.is_file()]:
        assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
    folders.verify(run)
    assert {p: p.read_bytes() for p in kept} == kept and artifacts.read_json(run / "summary.json") == before
    assert (run / "merged" / "model.safetensors").exists() and not list(tmp_path.glob(".*"))
    assert cli.main(["purge", str(run)]) == 0
    assert "nothing to remove" in capfd.readouterr().out


def test_purge_removes_what_a_run_says_of_other_rows_and_of_tokens(run):
    """Those that --stop auto rests at, and those of before --allow-change."""
    data, summary = (artifacts.read_json(run / name) for name in ("data.json", "summary.json"))
    changed = [("lr", 1e-3, 1e-4), ("forget_text", "of the first rows", data["forget"]["sha256"])]
    changed += [("forget_tokens", "of their tokens", data["forget"]["tokens_sha256"])]
    summary["changed"] = [{"key": key, "from": before, "to": now} for key, before, now in changed]
    summary["stop"] = {"level": 2.0, "rows": 3, "tokens_sha256": "of tokens never seen"}
    artifacts.write_json(run / "summary.json", summary)
    artifacts.write_manifest(run)
    purge.purge(run)
    left = (run / "summary.json").read_text()
    assert not [value for value in (*changed[1][1:], *changed[2][1:], "of tokens never seen") if value in left]
    assert artifacts.read_json(run / "summary.json")["changed"][0] == {"key": "lr", "from": 1e-3, "to": 1e-4}


def test_purge_removes_what_it_does_not_know_and_what_lies_beside(run, tmp_path):
    artifacts.write_text(run / "records" / "forget.jsonl", "It is person 7")
    artifacts.write_manifest(run)
    artifacts.write_text(tmp_path / ".run.partial" / "identity.json", '{"carried": []}')
    artifacts.write_text(tmp_path / ".run.partial" / "records.jsonl", "It is person 7")
    assert "records/forget.jsonl" in purge.purge(run)
    assert not (run / "records").exists() and not (tmp_path / ".run.partial").exists()


def test_purge_does_not_seal_what_was_damaged_before(run, capfd):
    for name in ("adapter/adapter_model.safetensors", "summary.json"):
        written = (run / name).read_bytes()
        (run / name).write_bytes(written[:-1] + b"!")
        assert cli.main(["purge", str(run)]) == 3 and f"{name}: the file was changed" in capfd.readouterr().err
        assert (run / "init.safetensors").exists()
        (run / name).write_bytes(written)
    assert cli.main(["purge", str(run)]) == 0


def test_purge_leaves_models_alone(model_folder, data_files, tmp_path, capfd):
    out = tmp_path / "model"
    made = ["--model", str(model_folder), "--data", str(data_files[0]), "--out", str(out), "--epochs", "1"]
    assert cli.main(["finetune", *made]) == 0
    before = sorted(p.name for p in out.iterdir())
    assert cli.main(["purge", str(out)]) == 3 and "a model, whose weights know its rows" in capfd.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == before


def test_a_purge_that_fails_changes_nothing(run, monkeypatch):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    monkeypatch.setattr(folders, "_swap", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        purge.purge(run)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
