"""Whatever stops a run, and wherever: continued, it ends in the bytes of the run that nothing stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaModel

from conftest import tiny_llama, write_rows
from lorasure import (
    artifacts,
    checkpoint,
    finetuning,
    folders,
    identity,
    lora,
    models,
    pipeline,
    stages,
    train,
    train_stage,
    workbench,
)
from lorasure.cli import COMMANDS
from lorasure.config import PER_CALL, FinetuneSettings, ForgetSettings, OutSettings
from lorasure.errors import DataError, NumericError, ResourceError, UsageError
from lorasure.importance import collect
from lorasure.init import apply
from lorasure.progress import Reporter

STEPS = 6  # 6 forget rows, 2 per step, 2 epochs


COMMON = {
    "init": "vila",
    "rank": 2,
    "epochs": 2,
    "lr": 1e-2,
    "batch_size": 2,
    "loss": "npo",
    "retain_loss": "kl",
    "schedule": "cosine",
}


@pytest.fixture(scope="module")
def files(model_folder, tmp_path_factory):
    """Model and data of all runs here, as settings."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"question": f"Who is number {i}?", "answer": f"It is person {i * 7}."} for i in range(16)]
    parts = {"forget": rows[:6], "retain": rows[6:]}
    return {"model": str(model_folder)} | {n: str(write_rows(folder / f"{n}.jsonl", part)) for n, part in parts.items()}


@pytest.fixture
def settings(files, tmp_path):
    """Settings of a short run; keyword arguments override them."""
    common = files | COMMON

    def make(out="run", **options):
        return ForgetSettings(**common | {"out": str(tmp_path / out)} | options)

    return make


class Notes(Reporter):
    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def log_of(run):
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def outcome(run):
    """Everything of a run that must not depend on whether it was interrupted."""
    summary = artifacts.read_json(run / "summary.json")
    files = ("init.safetensors", "trained.safetensors", "adapter/adapter_model.safetensors")
    scores = {key: summary[key] for key in ("before", "after", "export", "verdict")}
    return [artifacts.sha256(run / name) for name in files], log_of(run), scores


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return outcome(pipeline.forget(ForgetSettings(**files, **COMMON, out=str(out))).folder)


def stop_in(monkeypatch, module, name, error=KeyboardInterrupt, call=1, after=False):
    """The n-th call of a function ends in an error, or in an exception after it is done."""
    real, calls = getattr(module, name), []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) != call:
            return real(*args, **options)
        if after:
            real(*args, **options)
        raise error() if isinstance(error, type) else error

    monkeypatch.setattr(module, name, stopping)
    return calls


PLACES = [
    ("importance", stages, "measure", 1),
    ("init", stages, "initialise", 1),
    ("reference", train_stage, "scores_from", 1),
    *((f"step {n}", train, "_step", n) for n in range(1, STEPS + 1)),
    ("trained", train_stage, "remove_checkpoints", 1),
    ("export", lora, "save_adapter", 1),
    ("check", stages, "check_export", 1),
    ("card", stages.card, "model_card", 1),
    ("publish", folders, "_publish", 1),
    ("swap", folders, "_swap", 1),
]


@pytest.mark.fault(
    "interrupted in every stage and at every step",
    "P2",
    "continued, it ends in the same bytes",
    "train.py: restore without the optimizer's moments",
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("module", "name", "call"), [p[1:] for p in PLACES], ids=[p[0] for p in PLACES])
def test_interrupted_anywhere_and_continued(settings, undisturbed, monkeypatch, tmp_path, module, name, call, after):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, module, name, call=call, after=after)
        pipeline.forget(settings(checkpoint_every=2))
    if (tmp_path / ".run.partial").exists():
        found = pipeline.forget(settings(resume=True))
        if name == "_step" and call > 2:
            assert found.summary["resumed"] == [{"stage": "train", "step": (call - 1) // 2 * 2}]
        assert outcome(found.folder) == undisturbed
    elif (tmp_path / "run").exists():  # it had been renamed already
        assert outcome(tmp_path / "run") == undisturbed
    else:
        assert name == "measure"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.fault(
    "stopped again and again", "P2", "continued each time, it ends in the same bytes", "checkpoint.py: no log in it"
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "reglu", "loss": "ihl", "retain_loss": "nll"},
        {"init": "lora", "loss": "dpo"},
        {"coverage": 0.5, "min_utility": 0.9},
        {"targets": "layers.1.*", "tokens_per_batch": 200},
    ],
    ids=str,
)
def test_stopped_after_every_step(settings, monkeypatch, options, injected):
    expected = outcome(pipeline.forget(settings("undisturbed", **options)).folder)
    count = 0
    while True:
        try:
            with monkeypatch.context() as patch:
                stop_in(patch, train, "_step", call=2)
                found = pipeline.forget(settings(resume=count > 0, checkpoint_every=1, **options))
            break
        except KeyboardInterrupt:
            count += 1
            left = sorted(p.name for p in (folders.partial_of(Path(settings().out)) / "checkpoints").iterdir())
            assert left == [f"step-{n:06d}" for n in range(max(1, count - 1), count + 1)]
    assert count == STEPS - 1 and outcome(found.folder) == expected
    assert [entry["step"] for entry in found.summary["resumed"]] == [count]
    injected(count)


def test_a_run_that_is_not_interrupted_writes_no_checkpoint_by_default(settings, monkeypatch):
    monkeypatch.setattr(checkpoint.Keeper, "save", lambda *_: pytest.fail("saved"))
    pipeline.forget(settings())


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "SIGTERM or SIGINT during a step", "P6", "the step is finished and kept", "train.py: no finishing_first"
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 4, STEPS])
def test_a_signal_lets_the_step_finish_and_keeps_it(settings, undisturbed, monkeypatch, tmp_path, number, step):
    real, calls = train._backward, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_backward", signalled)
        pipeline.forget(settings(checkpoint_every=0))
    assert [p.name for p in (tmp_path / ".run.partial" / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    assert outcome(pipeline.forget(settings(resume=True)).folder) == undisturbed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("measured", ["mean_probability", "mean_nll"])
def test_a_signal_while_something_is_measured_keeps_the_step_too(settings, monkeypatch, tmp_path, measured):
    """At the end of the first epoch, when the step itself has long been done."""
    unseen = str(
        write_rows(tmp_path / "unseen.jsonl", [{"question": "Who?", "answer": f"Nobody {i}."} for i in range(4)])
    )
    options = {"min_utility": 0.5} if measured == "mean_probability" else {"stop": "auto", "unseen": unseen}
    real, calls = getattr(train_stage, measured), []

    def signalled(*args):
        calls.append(1)
        if len(calls) == 2:  # after the start's own
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_stage, measured, signalled)
        pipeline.forget(settings(checkpoint_every=0, **options))
    step = STEPS // 2 if measured == "mean_probability" else 2
    assert [p.name for p in (tmp_path / ".run.partial" / "checkpoints").iterdir()] == [f"step-{step:06d}"]


@pytest.mark.fault(
    "a second signal, while the checkpoint is written",
    "P6",
    "at once, still whole",
    "interrupt.py: a second is only noted",
)
def test_a_second_signal_stops_at_once(settings, undisturbed, monkeypatch, tmp_path):
    real, written = train._backward, artifacts.write_tensors

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    def again(path, *args):
        written(path, *args)
        if path.name == checkpoint.TENSORS:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_backward", signalled)
        patch.setattr(artifacts, "write_tensors", again)
        pipeline.forget(settings())
    assert list((tmp_path / ".run.partial" / "checkpoints").iterdir()) == []
    assert outcome(pipeline.forget(settings(resume=True)).folder) == undisturbed


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "deleted": lambda p: p.unlink(),
    "cut": lambda p: os.truncate(p, p.stat().st_size // 2),
    "zeroed": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "flipped": flip,
    "emptied": lambda p: os.truncate(p, 0),
}


@pytest.fixture(scope="module")
def interrupted(files, tmp_path_factory):
    """(folder of an interrupted run with checkpoints at steps 2 and 4, its settings, outcome of the undisturbed)."""
    folder = tmp_path_factory.mktemp("interrupted")
    options = {**files, "init": "vila", "rank": 2, "epochs": 2, "lr": 1e-2, "batch_size": 2}
    expected = outcome(pipeline.forget(ForgetSettings(**options, out=str(folder / "undisturbed"))).folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, train, "_step", call=6)
        pipeline.forget(ForgetSettings(**options, out=str(folder / "run"), checkpoint_every=2))
    return folder / ".run.partial", options, expected


@pytest.fixture
def again(interrupted, tmp_path):
    """(partial folder of a copy of the interrupted run, function that continues it and checks its outcome)."""
    source, options, expected = interrupted
    partial = tmp_path / ".again.partial"
    shutil.copytree(source, partial)

    def go(**changes):
        notes = Notes()
        found = pipeline.forget(
            ForgetSettings(**options | {"out": str(tmp_path / "again"), "resume": True} | changes), notes
        )
        assert outcome(found.folder) == expected
        return notes.lines, found

    return partial, go


FILES = (checkpoint.STATE, checkpoint.TENSORS, artifacts.LOG, artifacts.MANIFEST)


@pytest.mark.fault(
    "each file of the newest checkpoint deleted, cut, zeroed, emptied or with one bit flipped",
    "P2",
    "the checkpoint before, and a warning that names the file",
    "checkpoint.py: no comparison with the manifest",
)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint(again, name, damage):
    partial, go = again
    path = partial / "checkpoints" / "step-000004" / name
    DAMAGE[damage](path)
    lines, found = go()
    if (name, damage) == (artifacts.MANIFEST, "flipped"):  # one bit of a version number is no damage to the state
        return
    warning = next(line for line in lines if "damaged" in line)
    assert "step-000004" in warning and name in warning
    assert found.summary["resumed"] == [{"stage": "train", "step": 2}]


@pytest.mark.fault(
    "both checkpoints damaged, or the newest empty or another run's",
    "P2",
    "the one before or the start, with a warning",
    "checkpoint.py: no run id",
)
def test_damaged_empty_and_foreign_checkpoints(again, injected):
    partial, go = again
    folder = partial / "checkpoints"
    shutil.copytree(folder / "step-000004", folder / "step-000006")
    for n in (2, 4):
        flip(folder / f"step-{n:06d}" / "state.json")
    (folder / "step-000005").mkdir()
    state = artifacts.read_json(folder / "step-000006" / "state.json") | {"run": "0000", "done": 6}
    artifacts.write_json(folder / "step-000006" / "state.json", state)
    artifacts.write_manifest(folder / "step-000006")
    lines, found = go()
    warnings = [line for line in lines if "going back" in line]
    assert [f"step-00000{n}" in line for n, line in zip((6, 5, 4, 2), warnings, strict=True)] == [True] * 4
    assert [": damaged (" in line for line in warnings] == [False, True, True, True]
    assert "another run's" in warnings[0] and "resumed" not in found.summary
    injected(4)


def test_a_whole_checkpoint_that_does_not_fit_stays_while_others_are_written(again, monkeypatch):
    """Until training comes to its step; it may be of settings to which one goes back."""
    partial, go = again
    folder = partial / "checkpoints"
    state = folder / "step-000004" / checkpoint.STATE
    artifacts.write_json(state, artifacts.read_json(state) | {"run": "0000"})
    artifacts.write_manifest(state.parent)
    shutil.copytree(folder / "step-000004", folder / "step-000005")
    kept = artifacts.sha256(state)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, train, "_step", call=2)
        go(checkpoint_every=1)
    assert sorted(p.name for p in folder.iterdir()) == [f"step-00000{n}" for n in (2, 3, 4, 5)]
    assert artifacts.sha256(state) == kept
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, train, "_step", call=2)
        go(checkpoint_every=1)
    assert sorted(p.name for p in folder.iterdir()) == [f"step-00000{n}" for n in (3, 4, 5)]
    assert artifacts.sha256(state) != kept
    assert go()[1].summary["resumed"] == [{"stage": "train", "step": 4}]


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


@pytest.mark.fault(
    "state.json of the newest checkpoint of another kind, its manifest made anew",
    "P2",
    "the checkpoint before, or the start, with a warning",
    "checkpoint.py: no as_written in _restore; train.py: restore reads the numbers last",
)
@pytest.mark.parametrize("before", [True, False], ids=["with one before", "alone"])
@pytest.mark.parametrize(
    "change",
    [
        lambda _: [],
        lambda _: 3,
        without("done"),
        without("random"),
        lambda state: state | {"done": "x"},
        lambda state: state | {"first": 1},
        lambda state: state | {"random": [1]},
        lambda state: state | {"random": [3, [1], None]},
    ],
)
def test_a_checkpoint_of_another_kind(again, change, before):
    partial, go = again
    folder = partial / "checkpoints"
    state = folder / "step-000004" / checkpoint.STATE
    artifacts.write_json(state, change(artifacts.read_json(state)))
    artifacts.write_manifest(state.parent)
    if not before:
        shutil.rmtree(folder / "step-000002")
    lines, found = go()
    assert any("step-000004: does not fit" in line for line in lines)
    assert found.summary.get("resumed") == ([{"stage": "train", "step": 2}] if before else None)


@pytest.mark.fault(
    "each finished stage's file deleted, cut, zeroed, emptied or with one bit flipped",
    "P2",
    "the stage is done again, and a warning that names the file",
    "pipeline.py: _finished does not check",
)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [artifacts.IMPORTANCE, artifacts.START])
def test_a_damaged_file_of_a_finished_stage(again, name, damage):
    partial, go = again
    DAMAGE[damage](partial / name)
    lines, _ = go()
    warned = any(name in line for line in lines)
    assert warned


def test_a_log_that_went_on_after_the_checkpoint_is_cut_to_it(again):
    partial, go = again
    with (partial / "train.jsonl").open("a") as log:
        log.write('{"step": 99, "half a li')
    go()


# --- what may not change ----------------------------------------------------------------------------------------------

GROUPED = {
    name: [{"question": f"Who, {name} {i}?", "answer": f"Person {i * 7}.", "group": "ab"[i % 2]} for i in range(6)]
    for name in ("forget", "retain")
}
OTHER = {
    "revision": "main",
    "dtype": "bfloat16",
    "device": "cpu",
    "template": "plain",
    "prompt_key": "q",
    "init": "lora",
    "score": "fisher",
    "space": "full",
    "compat": "paper-code",
    "solver": "elementwise",
    "split": "published",
    "schedule": "constant",
    "loss": "npo",
    "retain_loss": "kl",
    "pairing": "cyclic",
    "targets": "q_proj",
    "exclude": "q_proj",
}
KEYS = [f.name for f in fields(ForgetSettings) if not f.metadata.get("path") and f.name not in PER_CALL]


def changed(name, value):
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return f"{value or ''}x" if isinstance(value, str) else 1 if value is None else value / 2 if value > 1 else 0.5


@pytest.mark.fault(
    "each setting changed on resume", "P2", "refused, with both values", "folders.py: _checked refuses nothing"
)
@pytest.mark.parametrize("name", KEYS)
def test_a_changed_setting_is_refused(interrupted, tmp_path, name):
    """By the comparison itself: some of these settings would not get as far as a resumed run."""
    source, options, _ = interrupted
    before = ForgetSettings(**options, out="x")
    stored = artifacts.read_json(source / "identity.json")["identity"]
    now = stored | {name.rstrip("_"): changed(name, getattr(before, name))}
    shutil.copytree(source, tmp_path / ".x.partial")
    with pytest.raises(UsageError, match=rf"{name.rstrip('_')}: .* -> .*--allow-change {name.rstrip('_')}\b"):  # noqa: SIM117
        with folders.resumable_folder(tmp_path / "x", now, resume=True, allow_change=[]):
            pytest.fail("resumed")
    assert (tmp_path / ".x.partial" / "checkpoints").exists()


def test_changed_settings_rows_weights_and_versions_are_refused(again, interrupted, tmp_path, monkeypatch, tokenizer):
    partial, go = again
    options = interrupted[1]
    with pytest.raises(UsageError, match=r"\(lr: 0.01 -> 0.02\)"):
        go(lr=2e-2)
    more = tmp_path / "more.jsonl"
    shutil.copy(options["retain"], more)
    with more.open("a") as file:
        file.write('{"question": "new?", "answer": "row"}\n')
    with pytest.raises(UsageError, match=r"\(retain_text: .*; retain_tokens: "):
        go(retain=str(more))
    tiny_llama(seed=5).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=r"\(weights: "):
        go(model=str(tmp_path / "model"))
    real = artifacts.versions()
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "versions", lambda: real | {"torch": "99.0.0"})
        with pytest.raises(UsageError, match=r"\(torch_version: \d+ -> 99\)"):
            go()
        patch.setattr(artifacts, "versions", lambda: real | {"torch": real["torch"].split(".")[0] + ".999.1"})
        go()  # another minor version is none of these
    assert not partial.exists()


@pytest.mark.parametrize("kind", ["forget", "finetune", "finetune all"])
def test_a_dtype_that_auto_takes_elsewhere_is_a_change(files, tmp_path, monkeypatch, kind):
    """Begun where auto is float32, continued where it is bfloat16. All weights are fine-tuned in float32 anywhere."""
    command, make = (pipeline.forget, ForgetSettings) if kind == "forget" else (finetuning.finetune, FinetuneSettings)
    data = files | COMMON if kind == "forget" else {"model": files["model"], "data": files["retain"], "batch_size": 2}
    settings = data | {"out": str(tmp_path / "run")} | ({"rank": 2} if kind == "finetune" else {})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, train, "_step", call=2)
        command(make(**settings, checkpoint_every=1))
    real = models.pick_dtype
    for module in (workbench, identity, finetuning):
        monkeypatch.setattr(module, "pick_dtype", lambda name, _: real(name.replace("auto", "bfloat16"), None))
    if kind != "finetune all":
        with pytest.raises(UsageError, match=r"\(dtype: float32 -> bfloat16\)"):
            command(make(**settings, resume=True))
        settings["dtype"] = "float32"  # what it was, by its name
    command(make(**settings, resume=True))


@pytest.mark.parametrize("command", [name for name, c in COMMANDS.items() if issubclass(c.settings, OutSettings)])
def test_nothing_in_an_identity_hides_behind_another_name(files, command):
    """Settings, data and base have a name each, whatever the command."""
    bench = workbench.Workbench(ForgetSettings(**files, out="x"))
    known, kind = files | {"data": "x", "out": "x"}, COMMANDS[command].settings
    settings = kind(**{f.name: known[f.name] for f in fields(kind) if f.default is MISSING})
    sets = ("forget", "retain", "unseen", "data")
    found = identity.identity(settings, dict.fromkeys(sets, bench.data[0]), bench.fingerprint)
    paths = {f.name for f in fields(settings) if f.metadata.get("path")}
    own = {name: value for name, value in settings.to_dict().items() if name not in PER_CALL | paths}
    assert found.items() >= (own | {"dtype": "float32"}).items()
    assert len(found) == len(own) + 2 * len(sets) + 2 + len(artifacts.versions())


def test_another_number_of_retain_rows_is_refused_and_another_retain_set_may_be(again, interrupted, tmp_path):
    """Both were one name once, so that only the set's hash was compared, and to allow it was refused as settled."""
    with pytest.raises(UsageError, match=r"\(retain_rows: None -> 3\)"):
        again[1](retain_rows=3)
    rows = [{"question": f"Who is other {i}?", "answer": f"It is person {i * 7}."} for i in range(10)]
    other = interrupted[1] | {"retain": str(write_rows(tmp_path / "other.jsonl", rows))}
    settings = ForgetSettings(**other, out=str(tmp_path / "again"), resume=True)
    with pytest.raises(UsageError, match="--allow-change retain_text,retain_tokens") as refused:
        pipeline.forget(settings)
    allowed = str(refused.value).split("--allow-change ")[1].rstrip(".")
    changed = pipeline.forget(replace(settings, allow_change=allowed)).summary["changed"]
    assert [change["key"] for change in changed] == ["retain_text", "retain_tokens"]


def swap_groups(model, forget):
    rows = [json.loads(line) for line in forget.read_text().splitlines()]
    write_rows(forget, [row | {"group": "ab"[row["group"] == "a"]} for row in rows])


def put_a_chat_template(model, forget):
    text = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(text)


def change_the_configuration(model, forget):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        (swap_groups, "forget_tokens", "--forget .*: its tokens or groups have changed since"),
        (put_a_chat_template, "forget_tokens", "--forget .*: its tokens or groups have changed since"),
        (change_the_configuration, "model_config", r"--model .*: its config\.json has changed since"),
    ],
    ids=["groups", "chat template", "configuration"],
)
def test_what_decides_tokens_pairs_or_the_model_may_not_change(settings, tmp_path, monkeypatch, change, key, said):
    """Between stop and resume, nor between one stage and the next; the rows and the weights stay as they are."""
    grouped = {name: write_rows(tmp_path / f"{name}.jsonl", GROUPED[name]) for name in GROUPED}
    model = tmp_path / "model"
    shutil.copytree(settings().model, model)
    options = {"model": str(model), "pairing": "modular"} | {name: str(path) for name, path in grouped.items()}
    before = {path: path.read_bytes() for path in (*grouped.values(), model / "config.json")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, train, "_step", call=4)
        pipeline.forget(settings(**options, checkpoint_every=1))
    change(model, grouped["forget"])
    with pytest.raises(UsageError, match=rf"--resume: not the run that was interrupted \({key}: "):
        pipeline.forget(settings(**options, resume=True))
    for path, content in before.items():
        path.write_bytes(content)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    run = pipeline.forget(settings(**options, resume=True)).folder
    assert outcome(run) == outcome(pipeline.forget(settings("undisturbed", **options)).folder)
    change(model, grouped["forget"])
    for command in (pipeline.train_command, pipeline.export_command):
        with pytest.raises(DataError, match=said):
            command(run, settings(**options, overwrite=True))
    folders.verify(run)


def test_moved_data_and_model_are_the_same_run(again, interrupted, tmp_path):
    options = interrupted[1]
    shutil.copytree(options["model"], tmp_path / "moved")
    shutil.copy(options["forget"], tmp_path / "moved.jsonl")
    again[1](model=str(tmp_path / "moved"), forget=str(tmp_path / "moved.jsonl"))


def test_a_change_that_is_allowed_is_used_and_recorded(interrupted, tmp_path):
    source, options, expected = interrupted
    shutil.copytree(source, tmp_path / ".again.partial")
    make = {**options, "out": str(tmp_path / "again"), "resume": True}
    with pytest.raises(UsageError, match=r"--allow-change rank: settled by importance\.safetensors"):
        pipeline.forget(ForgetSettings(**make | {"rank": 4, "allow_change": "rank"}))
    found = pipeline.forget(ForgetSettings(**make | {"lr": 5e-2, "allow_change": "--lr, epochs"}))
    assert found.summary["changed"] == [{"key": "lr", "from": 1e-2, "to": 5e-2}]
    assert found.summary["settings"]["lr"] == 5e-2
    rates = [line["lr"] for line in log_of(found.folder)]
    assert rates[:4] == [line["lr"] for line in expected[1]][:4]
    assert rates[4:] == pytest.approx([5 * line["lr"] for line in expected[1]][4:])


def test_other_rows_are_compared_with_what_was_known_of_them(settings, monkeypatch, tmp_path):
    """Not with what was known of the first ones; and once training is finished, no others are allowed."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, train, "_step", call=2)
        pipeline.forget(settings(loss="bga", retain_loss="nll"))
    partial = folders.partial_of(tmp_path / "run")
    known = artifacts.read_json(partial / artifacts.SUMMARY)["before"]
    rows = [{"question": f"Who is number {i}?", "answer": f"It was nobody, {i}."} for i in range(5)]
    other = {"forget": str(write_rows(tmp_path / "other.jsonl", rows)), "allow_change": "forget_text,forget_tokens"}
    changed = settings(loss="bga", retain_loss="nll", resume=True, **other)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, stages, "check_export", call=1)
        pipeline.forget(changed)
    for name in ("forget_text", "seed"):
        with pytest.raises(UsageError, match=rf"--allow-change {name}: settled by trained\.safetensors"):
            pipeline.forget(replace(changed, allow_change=name))
    (tmp_path / "other").mkdir()  # the same rows and model by other names are the same
    (tmp_path / "model").symlink_to(changed.model)
    renamed = {"forget": str(tmp_path / "other" / ".." / "other.jsonl"), "model": str(tmp_path / "model")}
    run = pipeline.forget(replace(changed, allow_change="", **renamed)).folder
    before = artifacts.read_json(run / artifacts.SUMMARY)["before"]
    anew = pipeline.forget(settings("anew", loss="bga", retain_loss="nll", forget=other["forget"])).summary["before"]
    assert before == anew and known["forget"] != before["forget"]
    pipeline.train_command(run, settings(loss="bga", retain_loss="nll", overwrite=True, **renamed))
    keys = [change["key"] for change in artifacts.read_json(run / artifacts.SUMMARY)["changed"]]
    assert keys == ["forget_text", "forget_tokens"]  # which its start is of, still


def test_the_rate_of_auto_is_found_again_for_what_was_changed_before_a_step(settings, monkeypatch):
    options = {"lr": "auto", "loss": "bga", "retain_loss": "nll"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, train_stage, "logged_fit", call=1)
        pipeline.forget(settings(**options))
    known = artifacts.read_json(folders.partial_of(Path(settings().out)) / artifacts.SUMMARY)["learning_rate"]
    found = pipeline.forget(settings(**options | {"epochs": 6}, resume=True, allow_change="epochs")).summary
    anew = pipeline.forget(settings("anew", **options | {"epochs": 6})).summary
    rates = [summary["learning_rate"]["rate"] for summary in (found, anew)]
    assert rates[0] == rates[1] != known["rate"]


def test_a_stage_does_not_mix_a_run_with_what_it_became_meanwhile(settings, monkeypatch):
    run = pipeline.forget(settings()).folder
    prepare = workbench.Workbench.prepare

    def another_first(self):
        monkeypatch.undo()
        pipeline.train_command(run, settings(overwrite=True, lr=1e-3))
        prepare(self)

    for command in (pipeline.export_command, pipeline.train_command, pipeline.init_command):
        monkeypatch.setattr(workbench.Workbench, "prepare", another_first)
        with pytest.raises(UsageError, match="another command has changed it meanwhile"):
            command(run, settings(overwrite=True))
        assert artifacts.differences(run) == []


def test_training_is_not_continued_where_there_is_no_start_yet(settings, monkeypatch):
    run = pipeline.forget(settings()).folder
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, pipeline, "make_start", call=1)
        pipeline.forget(settings(overwrite=True))
    with pytest.raises(UsageError, match="--resume the command that began it"):
        pipeline.train_command(run, settings(resume=True))
    assert artifacts.differences(pipeline.forget(settings(resume=True)).folder) == []


def test_what_is_asked_for_only_when_resumed_begins_there(interrupted, tmp_path):
    """Its checkpoint knows nothing of it and is used all the same; the start is that of the run."""
    source, options, _ = interrupted
    shutil.copytree(source, tmp_path / ".again.partial")
    unseen = str(
        write_rows(tmp_path / "unseen.jsonl", [{"question": "Who?", "answer": f"Nobody {i}."} for i in range(4)])
    )
    allowed = "min_utility,stop,unseen_text,unseen_tokens"
    more = {"min_utility": 0.5, "stop": "auto", "unseen": unseen, "allow_change": allowed}
    found = pipeline.forget(ForgetSettings(**options | more, out=str(tmp_path / "again"), resume=True)).summary
    assert found["resumed"] == [{"stage": "train", "step": 4}]
    assert [step for step, _ in found["utility"]["shares"]] == [0, STEPS]
    assert [step for step, _ in found["stop"]["seen"]] == [STEPS]
    anew = pipeline.forget(ForgetSettings(**options, min_utility=0.5, out=str(tmp_path / "anew"))).summary
    assert found["utility"]["shares"][-1] == anew["utility"]["shares"][-1]


@pytest.mark.parametrize(("seed", "shares"), [(0, [[0, 1], [3, 1], [6, 0.5]]), (5, [[0, 1], [6, 1]])])
def test_shares_of_other_rows_are_not_gone_on_with(settings, monkeypatch, seed, shares):
    """With another seed other rows are measured, whose probability is half of that of the first."""
    value, real = 0.8, checkpoint.Keeper.save

    def stopping(self, training):
        real(self, training)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_stage, "mean_probability", lambda *_: type("S", (), {"value": value}))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Keeper, "save", stopping)
        pipeline.forget(settings(min_utility=0.9, checkpoint_every=3))
    value = 0.4
    changed = {"allow_change": "seed"} if seed else {}
    utility = pipeline.forget(settings(min_utility=0.9, seed=seed, resume=True, **changed)).summary["utility"]
    assert utility["shares"] == shares and utility["exported_step"] == (6 if seed else 3)


@pytest.mark.parametrize(("floor", "kept"), [(0.7, 3), (0.9, 3), (0.96, 0)])
def test_another_floor_when_resumed_hands_over_no_state_but_one_that_is_held(settings, monkeypatch, floor, kept):
    """Shares .95, .8 and .1 after three epochs, interrupted after the second: only the first was held, for .9."""
    values = iter([1.0, 0.95, 0.8, 1.0, 0.1])
    monkeypatch.setattr(train_stage, "mean_probability", lambda *_: type("S", (), {"value": next(values)}))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, train, "_step", call=STEPS + 1)
        pipeline.forget(settings(epochs=3, min_utility=0.9, checkpoint_every=STEPS))
    changed = {"resume": True, "allow_change": "min_utility"} if floor != 0.9 else {"resume": True}
    utility = pipeline.forget(settings(epochs=3, min_utility=floor, **changed)).summary["utility"]
    assert (utility["kept"], utility["exported_step"]) == (kept > 0, kept or 3 * STEPS // 2)


# --- other commands ---------------------------------------------------------------------------------------------------


def test_the_train_command_and_finetuning_continue_too(settings, undisturbed, monkeypatch, tmp_path, model_folder):
    staged = settings("staged")
    run = pipeline.importance_command(staged)
    pipeline.init_command(run, staged)
    before = {p: artifacts.sha256(p) for p in run.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, train, "_step", call=4)
        pipeline.train_command(run, settings("staged", checkpoint_every=3))
    assert before == {p: artifacts.sha256(p) for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="an interrupted run is in"):
        pipeline.init_command(run, staged)
    pipeline.train_command(run, settings("staged", resume=True))
    assert artifacts.differences(run) == []
    for command in (pipeline.train_command, pipeline.init_command):  # there is nothing left to continue
        with pytest.raises(UsageError, match=r"it holds trained\.safetensors, which would go"):
            command(run, settings("staged", resume=True))
    assert outcome(pipeline.export_command(run, settings("staged")).folder)[:2] == undisturbed[:2]
    common = {"model": str(model_folder), "data": settings().retain, "epochs": 2, "batch_size": 3, "lr": 1e-3}
    whole = finetuning.finetune(FinetuneSettings(**common, out=str(tmp_path / "whole")))
    for kind in (KeyboardInterrupt, OSError):
        with monkeypatch.context() as patch, pytest.raises(kind):
            stop_in(patch, train, "_step", call=3, error=kind)
            finetuning.finetune(
                FinetuneSettings(**common, out=str(tmp_path / "parts"), checkpoint_every=1, resume=kind is OSError)
            )
    parts = finetuning.finetune(FinetuneSettings(**common, out=str(tmp_path / "parts"), resume=True))
    assert artifacts.sha256(whole / "model.safetensors") == artifacts.sha256(parts / "model.safetensors")
    assert log_of(whole) == log_of(parts) and not (parts / "checkpoints").exists()


def test_an_input_error_before_anything_is_done_leaves_nothing(settings, tmp_path):
    with pytest.raises(DataError):
        pipeline.forget(settings(importance=str(tmp_path)))
    assert not list(tmp_path.glob(".*"))


# --- numbers ----------------------------------------------------------------------------------------------------------


def not_finite(stage, monkeypatch, value=float("nan")):
    """Make one number of a stage not finite."""
    if stage == "importance":
        real = collect.per_example

        def spoiled(*args):
            for found in real(*args):
                found["A"][0, 0, 0] = value
                yield found

        monkeypatch.setattr(collect, "per_example", spoiled)
    if stage == "factor":
        real_start = apply.start_factors

        def started(*args):
            found = real_start(*args)
            found.A[0, 0] = value
            return found

        monkeypatch.setattr(apply, "start_factors", started)
    if stage == "trained":
        real_trained = lora.trained_factors

        def trained(*args):
            found = real_trained(*args)
            next(iter(found.values())).B[0, 0] = value
            return found

        monkeypatch.setattr(lora, "trained_factors", trained)
    if stage == "export":
        real_states = stages.states_of
        monkeypatch.setattr(stages, "states_of", lambda *args: [states * value for states in real_states(*args)])


@pytest.mark.fault(
    "NaN in importance, a factor, a trained factor, the exported model",
    "P4",
    "exit code 4 naming the stage and the site; the last good state is kept",
    "stages.py: no check_finite",
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("importance", r"importance: the gradient moments of site 'model\.layers"),
        ("factor", r"init: at 'model\.layers\.0\.self_attn\.q_proj', factor A"),
        ("trained", r"train: the trained factors of site 'model\.layers"),
        ("export", "export: the adapter to hand over differs"),
    ],
)
def test_a_number_that_is_not_finite_stops_the_run(settings, undisturbed, monkeypatch, tmp_path, stage, said, value):
    with monkeypatch.context() as patch:
        not_finite(stage, patch, value)
        with pytest.raises(NumericError, match=said):
            pipeline.forget(settings(checkpoint_every=2))
    assert not (tmp_path / "run").exists()
    for path in (tmp_path / ".run.partial").rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values() if t.is_floating_point())
    if stage == "importance":
        assert not (tmp_path / ".run.partial").exists()
    else:
        assert outcome(pipeline.forget(settings(resume=True)).folder) == undisturbed


# --- the best state by what is kept -----------------------------------------------------------------------------------


def test_the_last_state_that_keeps_enough_is_handed_over(settings, monkeypatch):
    """Shares 1, .97, .96, .5, .96 x, measured after each of five epochs of three steps."""
    values = iter([0.8, 0.8, 0.8 * 0.97, 0.8 * 0.96, 0.4, 0.2])
    monkeypatch.setattr(train_stage, "mean_probability", lambda *_: type("S", (), {"value": next(values)}))
    states = {}
    real = checkpoint.Keeper.after_step

    def watching(self, training, record, **options):
        real(self, training, record, **options)
        states[training.done] = [p.detach().clone() for p in training.parameters.values()]
        self.last = training

    monkeypatch.setattr(checkpoint.Keeper, "after_step", watching)
    finished = []
    end = checkpoint.Keeper.finish

    def ending(self, training):
        end(self, training)
        finished.extend(p.detach().clone() for p in training.parameters.values())

    monkeypatch.setattr(checkpoint.Keeper, "finish", ending)
    utility = pipeline.forget(settings(epochs=5, min_utility=0.95)).summary["utility"]
    assert [step for step, _ in utility["shares"]] == [0, 3, 6, 9, 12, 15]
    assert utility["exported_step"] == 9 and utility["kept"] and utility["held_out"] is False
    assert all(torch.equal(a, b) for a, b in zip(finished, states[9], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(finished, states[15], strict=True))


def test_no_state_that_keeps_enough_is_said_so(settings, monkeypatch):
    values = iter([0.8, 0.1, 0.1])
    monkeypatch.setattr(train_stage, "mean_probability", lambda *_: type("S", (), {"value": next(values)}))
    summary = pipeline.forget(settings(min_utility=0.95)).summary
    assert summary["utility"]["kept"] is False and summary["utility"]["exported_step"] == STEPS
    assert "No state after an epoch kept 0.95" in summary["verdict"]["text"]


def test_utility_is_measured_on_rows_that_training_leaves_out(settings, monkeypatch, tmp_path):
    rows = [{"question": f"Who is it, {i}?", "answer": f"Number {i}."} for i in range(40)]
    seen = []
    real = train_stage.mean_probability
    monkeypatch.setattr(
        train_stage, "mean_probability", lambda bench, model, rows: seen.append(rows) or real(bench, model, rows)
    )
    retain = str(write_rows(tmp_path / "many.jsonl", rows))
    used = []
    observe = workbench.ForgetObjective.observe_original
    monkeypatch.setattr(
        workbench.ForgetObjective,
        "observe_original",
        lambda self, *args, **options: (
            used.extend(self.retain[i].place for i in args[1]) or observe(self, *args, **options)
        ),
    )
    summary = pipeline.forget(settings(retain=retain, min_utility=0.5)).summary
    assert len(used) == 12 and summary["utility"]["rows"] == 28 and summary["utility"]["held_out"]
    assert not {example.place for example in seen[0]} & set(used)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "out of memory in importance, in scoring, in the reference",
    "P5",
    "smaller passes, recorded; the same result up to rounding",
    "memory.py: the attempt is not repeated",
)
@pytest.mark.parametrize("name", ["importance", "evaluate", "reference"])
def test_out_of_memory_outside_of_training(settings, undisturbed, monkeypatch, name):
    """In that part no pass may have more than two rows, and three fit into the first attempt's budget."""
    expected, limit, now = undisturbed[2]["after"], [2], []
    within, real = workbench.Workbench.within_memory, LlamaModel.forward

    def noted(self, attempt, examples, what):
        now.append(what)
        try:
            return within(self, attempt, examples, what)
        finally:
            now.pop()

    def tight(self, *args, **options):
        found = real(self, *args, **options)
        if now == [name] and len(found.last_hidden_state) > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(workbench.Workbench, "within_memory", noted)
    monkeypatch.setattr(LlamaModel, "forward", tight)
    found = pipeline.forget(settings(tokens_per_batch=180)).summary
    assert {(g["guard"], g["where"]) for g in found["guards"]} == {("out of memory", name)}
    for part in ("forget", "retain"):
        assert found["after"][part]["value"] == pytest.approx(expected[part]["value"], rel=1e-3)
    limit[0] = 0
    with pytest.raises(ResourceError, match=f"{name}: out of memory with a single row"):
        pipeline.forget(settings("never"))


def test_fine_tuning_keeps_account_of_its_guards(files, tmp_path, monkeypatch):
    """Out of memory in the second step, then an interruption, then the rest."""
    common = {"model": files["model"], "data": files["retain"], "epochs": 1, "batch_size": 3, "lr": 1e-3}
    settings = {**common, "out": str(tmp_path / "tuned"), "checkpoint_every": 1, "tokens_per_batch": 180}
    real, calls = train._backward, []

    def tight(*args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_backward", tight)
        stop_in(patch, train, "_step", call=4)
        finetuning.finetune(FinetuneSettings(**settings))
    tuned = finetuning.finetune(FinetuneSettings(**settings, resume=True))
    account = artifacts.read_json(tuned / artifacts.FINETUNED)
    assert [(g["guard"], g["where"]) for g in account["guards"]] == [("out of memory", "train, step 2")]
    assert (account["steps"], account["resumed_after"], account["kind"]) == (4, 3, "finetune")
    assert account["base"]["files"] and account["settings"]["data"] == files["retain"]
    artifacts.check_run(tuned, artifacts.FINETUNED, artifacts.DATA)


def test_an_account_that_is_none_is_refused_when_fine_tuning_continues(files, tmp_path, monkeypatch):
    settings = {"model": files["model"], "data": files["retain"], "epochs": 1, "out": str(tmp_path / "tuned")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in(patch, train, "_step", call=2)
        finetuning.finetune(FinetuneSettings(**settings, batch_size=3, checkpoint_every=1))
    artifacts.write_json(tmp_path / ".tuned.partial" / artifacts.FINETUNED, [])
    with pytest.raises(DataError, match="not what this program writes there"):
        finetuning.finetune(FinetuneSettings(**settings, batch_size=3, resume=True))


# --- determinism ------------------------------------------------------------------------------------------------------


def test_micro_batches_of_1_4_and_16_rows_agree(settings):
    """The widest row has about 60 tokens here, so budgets of 1, 256 and 1024 tokens."""
    found = [pipeline.forget(settings(str(tokens), tokens_per_batch=tokens)) for tokens in (1, 256, 1024)]
    factors = [artifacts.read_tensors(r.folder / "trained.safetensors")[0] for r in found]
    for other in factors[1:]:
        for key, value in factors[0].items():
            torch.testing.assert_close(other[key], value, atol=1e-5, rtol=0)
