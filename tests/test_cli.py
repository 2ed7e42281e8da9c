"""The command line as a user meets it: one clear line for every mistake, the right exit code, nothing left behind."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import tiny_llama, write_rows
from lorasure import artifacts, cli, interrupt, libraries, pipeline, stages, train_stage
from lorasure.attacking import GATE_FAILED
from lorasure.errors import INTERRUPTED, LorasureError
from lorasure.failures import MISTAKE
from lorasure.probe import NOTHING_FOUND

ROOT = Path(__file__).resolve().parents[1]
SECRET = "Quillfeather"


@pytest.fixture
def base(model_folder, data_files, tmp_path):
    """Arguments that work, without --out."""
    forget, retain = data_files
    files = ["--model", str(model_folder), "--forget", str(forget), "--retain", str(retain)]
    return [*files, "--rank", "2", "--init", "vila"]


@pytest.fixture
def fails(tmp_path, capfd):
    """Run a command that must fail: the exit code, exactly one line on standard error, and no new file."""

    def check(code, arguments, *said):
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        assert cli.main(arguments) == code
        captured = capfd.readouterr()
        assert captured.out == ""
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("lorasure: "), captured.err
        for text in said:
            assert text in lines[0]
        assert SECRET not in lines[0]
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return check


def replaced(arguments, flag, value):
    at = arguments.index(flag) + 1
    return [*arguments[:at], str(value), *arguments[at + 1 :]]


USAGE = [
    (["--rank", "200"], "--rank must be in [1, 8]"),
    (["--rank", "0"], "--rank must be at least 1, got 0"),
    (["--rank", "two"], "--rank must be a whole number, got 'two'"),
    (["--rank", "2.5"], "--rank must be a whole number, got '2.5'"),
    (["--probe-rank", "x"], "--probe-rank must be a whole number, got 'x'"),
    (["--loss", "nop"], "Did you mean 'npo'?"),
    (["--retain-loss", "nl"], "Did you mean 'nll'?"),
    (["--init", "villa"], "Did you mean 'vila'?"),
    (["--solver", "row"], "Did you mean 'rows'?"),
    (["--score", "fischer"], "Did you mean 'fisher'?"),
    (["--space", "ful"], "Did you mean 'full'?"),
    (["--split", "balance"], "Did you mean 'balanced'?"),
    (["--pairing", "cycle"], "Did you mean 'cyclic'?"),
    (["--schedule", "cosin"], "Did you mean 'cosine'?"),
    (["--template", "qaa"], "Did you mean 'qa'?"),
    (["--dtype", "float23"], "Did you mean 'float32'?"),
    (["--device", "toaster"], "--device must be"),
    (["--device", "xpu:7"], "--device xpu:7: there is no such device here"),
    (["--compat", "paper"], "paper-code"),
    (["--compat", "paper-code", "--init", "sketch"], "--compat paper-code covers --score fisher --space full or"),
    (["--compat", "paper-code", "--init", "reglu"], "--compat paper-code is about importance"),
    (["--compat", "paper-code", "--solver", "elementwise"], "--solver elementwise does not go with it"),
    (["--pairing", "modular"], "needs a group for every row (--group-key)"),
    (["--lr", "-1"], "--lr must be above 0, got -1.0"),
    (["--lr", "nan"], "--lr must be a finite number, got nan"),
    (["--warmup", "2"], "--warmup must be at most 1"),
    (["--epochs", "0"], "--epochs must be at least 1"),
    (["--merge", "maybe"], "--merge must be true or false, got 'maybe'"),
    (["--losss", "npo"], "'--losss'. Did you mean '--loss'?"),
    (["--los", "npo"], "'--los'. Did you mean '--loss'?"),
    (["surplus"], "'surplus'"),
    (["--seed"], "--seed: expected one argument"),
    (["--loss", "ihl", "--beta", "0.1"], "beta is not a setting of 'ihl'"),
    (["--coverage", "0.5", "--init", "lora"], "--coverage below 1"),
    (["--targets", "nothing_like_it"], "--targets"),
    (["--export-rank", "5"], "--export-rank must be in [1, 4]"),
    (["--export-rank", "3", "--init", "lora"], "--export-rank must be in [1, 2]"),
    (["--text-key", "a", "--answer-key", "b"], "--text-key cannot be combined"),
    (["--importance", "no/such/run"], "--importance no/such/run"),
    (["--config", "no/such.yaml"], "--config"),
]


@pytest.mark.parametrize(("extra", "said"), USAGE, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_usage_errors(base, fails, tmp_path, extra, said):
    fails(2, ["forget", *base, "--out", str(tmp_path / "run"), *extra], said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs: 1\nlearning_rate: 3\n", "unknown setting 'learning_rate'"),
        ("epoch: 1\n", "Did you mean 'epochs'?"),
        ("rank: two\n", "--rank must be a whole number, got 'two'"),
        ("rank: true\n", "--rank must be a whole number"),
        ("rank: 4\nlr: 1e-3\nrank: 8\n", "run.yaml:3: not usable YAML ('rank' is there twice)"),
        ("epochs: [1\n", "--config is not valid YAML"),
        ("- 1\n", "--config must hold names and values"),
        ("", "--config must hold names and values, got: nothing."),
        ("merge: maybe\n", "--config: a setting that must be true or false is 'maybe'."),
        ("rank: !!python/object/apply:os.system ['touch canary']\n", "--config"),
    ],
)
def test_yaml_errors(base, fails, tmp_path, text, said):
    (tmp_path / "run.yaml").write_text(text)
    fails(2, ["forget", *base, "--out", str(tmp_path / "run"), "--config", str(tmp_path / "run.yaml")], said)


def test_commands_and_required_flags(fails, tmp_path):
    fails(2, ["forgett"], "Did you mean 'forget'?")
    fails(2, ["forget", "--model", "m"], "--forget, --retain, --out")
    fails(2, ["train"], "lorasure train RUN")
    fails(3, ["train", str(tmp_path)], "not a run folder")


def test_out_that_cannot_be_used(base, fails, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    fails(2, ["forget", *base, "--out", str(home)], "not empty", "--overwrite")
    fails(2, ["forget", *base, "--out", str(home), "--overwrite"], "replaces earlier runs only")
    fails(2, ["forget", *base, "--out", str(home / "thesis.txt")], "this is a file")
    fails(2, ["forget", *base, "--out", str(home / "thesis.txt" / "run")], "is a file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    fails(5, ["forget", *base, "--out", str(tmp_path / "run")], "no permission")


@pytest.mark.fault(
    "forget or retain rows empty, blank, not UTF-8, of wrong keys, no JSON, no Parquet",
    "P11",
    "exit 3 naming file and line; nothing is written",
    "readers.py: read_rows does not mind if there are none; _decoded puts marks for what is not UTF-8",
)
@pytest.mark.parametrize("which", ["--forget", "--retain"])
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "no rows"),
        ("blank.jsonl", b'{"question": "a", "answer": ""}\n', "blank"),
        ("latin.jsonl", '{"question": "a", "answer": "é"}\n'.encode("latin-1"), "latin.jsonl:1"),
        ("keys.jsonl", b'{"q": "Quillfeather", "a": "Quillfeather"}\n', "found the columns q, a"),
        ("bad.jsonl", b'{"question": Quillfeather}\n', "bad.jsonl:1: not valid JSON"),
        ("list.json", b"[1, 2]", "expected an object"),
        ("x.parquet", b"Quillfeather", "not a valid Parquet file"),
        ("x.pickle", b"x", "unknown file type '.pickle'"),
    ],
)
def test_data_errors(base, fails, tmp_path, which, name, content, said):
    (tmp_path / name).write_bytes(content)
    fails(3, ["forget", *replaced(base, which, tmp_path / name), "--out", str(tmp_path / "run")], said)


def test_missing_data(base, fails, tmp_path):
    fails(3, ["forget", *replaced(base, "--forget", "nowhere.jsonl"), "--out", str(tmp_path / "run")], "no such file")


@pytest.mark.fault(
    "a row to forget that is also to be kept",
    "P11",
    "exit 3 naming both lines; nothing is written",
    "workbench.py: no check_disjoint",
)
def test_overlap_names_both_lines_and_not_the_text(base, fails, tmp_path, data_files):
    row = {"question": f"Who is {SECRET}?", "answer": f"{SECRET} is a poet."}
    for path in data_files:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    fails(3, ["forget", *base, "--out", str(tmp_path / "run")], "forget.jsonl:7", "retain.jsonl:11")


@pytest.mark.fault(
    "an answer that --max-length cuts off altogether",
    "P11",
    "exit 3 naming the line; nothing is written",
    "encode.py: _cut does not refuse",
)
def test_answer_fully_truncated(base, fails, tmp_path):
    said = ["forget.jsonl:1", "--max-length"]
    fails(3, ["forget", *base, "--out", str(tmp_path / "run"), "--max-length", "8"], *said)


@pytest.mark.fault(
    "one row to forget and one to keep",
    "P11",
    "done; what one row does not show is null with its reason",
    "metrics.py: mean_score draws an interval from one row",
)
def test_one_row_of_each(base, tmp_path, data_files):
    for path in data_files:
        path.write_text(path.read_text().splitlines()[0] + "\n")
    flags = ["--score", "fisher", "--out", str(tmp_path / "run"), "--epochs", "1", "--min-utility", "0.5"]
    assert cli.main(["forget", *base, *flags]) == 0
    summary = artifacts.read_json(tmp_path / "run" / "summary.json")
    for when in ("before", "after"):
        for score in summary[when].values():
            assert score["n"] == 1 and 0 < score["value"] < 1 and score["low"] is score["high"] is None
    assert artifacts.read_json(tmp_path / "run" / "data.json")["forget"]["rows"] == 1


@pytest.mark.fault(
    "a tokenizer without a padding token, with end of text for it, with one of its own, on either side",
    "P10",
    "the same adapter, bit by bit",
    "encode.py: the tokenizer pads; examples.py: no label where the token is that of padding",
)
def test_the_padding_of_a_tokenizer_does_not_matter(base, tmp_path, tokenizer, model_folder, injected):
    made = set()
    own = {"pad_token": "."}  # also the last token of every answer
    kinds = (
        {"pad_token": None},
        {"padding_side": "left"},
        {"padding_side": "right"},
        own,
        own | {"padding_side": "left"},
    )
    for number, kind in enumerate(kinds):
        model = Path(shutil.copytree(model_folder, tmp_path / f"model-{number}"))
        like = copy.deepcopy(tokenizer)
        for name, value in kind.items():
            setattr(like, name, value)
        like.save_pretrained(model)
        arguments = replaced(base, "--model", model)
        out = tmp_path / f"run-{number}"
        assert cli.main(["forget", *arguments, "--out", str(out), "--epochs", "1", "--loss", "npo"]) == 0
        made.add(artifacts.sha256(out / "adapter" / "adapter_model.safetensors"))
    assert len(made) == 1
    injected(len(kinds))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: (m / "model.safetensors").unlink(), "no weights"),
        (lambda m: (m / "config.json").unlink(), "no config.json"),
        (lambda m: (m / "config.json").write_text("{"), "config.json: not a readable JSON file"),
        (lambda m: (m / "config.json").write_text('{"model_type": "nonesuch"}'), "cannot be loaded"),
        (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 99), "cannot be loaded"),
        (lambda m: os.truncate(m / "model.safetensors", 2000), "cannot be loaded"),
        (lambda m: [p.unlink() for p in m.glob("tokenizer*")], "cannot be loaded"),
        (shutil.rmtree, "no such folder"),
    ],
    ids=["weights", "config", "bad config", "unknown type", "bad weights", "cut weights", "tokenizer", "folder"],
)
def test_damaged_model_folders(base, fails, tmp_path, model_folder, damage, said):
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    damage(broken)
    fails(3, ["forget", *replaced(base, "--model", broken), "--out", str(tmp_path / "run")], said)


@pytest.mark.fault(
    "NaN in a base weight, in its file",
    "P4",
    "exit 4 naming the weight; nothing is written",
    "models.py: no check_finite",
)
def test_nan_in_a_base_weight(base, fails, tmp_path, tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    arguments = ["forget", *replaced(base, "--model", tmp_path / "nan"), "--out", str(tmp_path / "run")]
    fails(4, arguments, "layers.1.mlp.up_proj.weight", "not finite")


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), 5, 5, "No space left on device"),
    (OSError(errno.EIO, "Input/output error"), 5, 5, "Input/output error"),
    (KeyboardInterrupt(), 130, 75, "interrupted"),
    (interrupt.Terminated(), 143, 75, "interrupted"),
]


@pytest.mark.parametrize(("error", "early", "late", "said"), FAILURES)
def test_a_failure_keeps_what_was_finished_and_nothing_else(
    base, tmp_path, capfd, monkeypatch, error, early, late, said
):
    def stop(*args, **options):
        raise error

    before = sorted(tmp_path.rglob("*"))
    arguments = ["forget", *base, "--out", str(tmp_path / "deep" / "run")]
    for module, name, code, kept in ((stages, "measure", early, False), (train_stage, "fit", late, True)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            assert cli.main(arguments) == code
        last = capfd.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("lorasure: ") and said in last
        assert ("--resume continues" if kept else "Nothing was written.") in last
        assert (sorted(tmp_path.rglob("*")) == before) is not kept
    assert cli.main([*arguments, "--resume"]) == 0
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run"]


@pytest.mark.parametrize(("stage", "kept"), [("measure", False), ("make_start", True)])
def test_an_error_that_nobody_thought_of(base, tmp_path, capfd, monkeypatch, stage, kept):
    def fail(*_, **__):
        raise LookupError(SECRET)

    monkeypatch.setattr(stages if stage == "measure" else pipeline, stage, fail)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["forget", *base, "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 70
    shown = capfd.readouterr().err
    last = shown.splitlines()[-1]
    where = r"\w+\.py:\d+, version \d\S*\."
    assert re.match(rf"lorasure: a mistake of ours: LookupError at {where}", last) and "LORASURE_TRACEBACK=1" in last
    assert "Traceback" not in shown and SECRET not in shown
    assert ("--resume continues" in last) == kept == (sorted(tmp_path.rglob("*")) != before)
    monkeypatch.setenv("LORASURE_TRACEBACK", "1")
    assert cli.main([*arguments, "--overwrite"]) == 70
    shown = capfd.readouterr().err
    assert "Traceback" in shown and f"LookupError: {SECRET}" in shown and "in fail" in shown


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_runs_out_where_no_smaller_pieces_help(error, base, tmp_path, capfd, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(stages, "check_export", full)
    assert cli.main(["forget", *base, "--out", str(tmp_path / "run"), "--epochs", "1"]) == 5
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("lorasure: out of memory.") and "--resume continues" in last


def test_the_exit_codes_are_written_down_everywhere():
    """The same list in the help texts and the README, and every code of ours in it."""
    readme = (ROOT / "README.md").read_text().split("Exit codes: ")[1].split("Every error")[0]
    listed = [re.findall(r"\b\d+\b", text) for text in (cli.EPILOG, readme)]
    assert listed[0] == listed[1]
    kinds = (kind for kind in LorasureError.__subclasses__() if kind.__module__.startswith("lorasure."))
    codes = {0, MISTAKE, INTERRUPTED, NOTHING_FOUND, GATE_FAILED, 130, 143, *(kind.exit_code for kind in kinds)}
    assert codes == set(map(int, listed[0]))


def test_a_signal_in_the_middle_of_training(base, tmp_path):
    command = [sys.executable, "-m", "lorasure", "forget", *base, "--out", str(tmp_path / "run"), "--epochs", "1000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline, partial = time.monotonic() + 60, tmp_path / ".run.partial"
    log = partial / "train.jsonl"
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    last = err.strip().splitlines()[-1]
    assert "Traceback" not in err and last.startswith("lorasure: interrupted. What was finished is kept")
    steps = len(log.read_text().splitlines())
    assert artifacts.differences(partial / "checkpoints" / f"step-{steps:06d}") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".run.partial", "forget.jsonl", "retain.jsonl"]


def test_flags_override_the_config_file_and_print_config_can_be_loaded(base, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("lambda: 2\nbatch_size: 3\nmerge: true\nlr: 1e-3\n")
    config, given = ["--config", str(tmp_path / "run.yaml")], ["--batch-size", "4"]
    for flags in ([*config, *given], [*given, *config], [*given, "=".join(config)]):  # wherever the file stands
        with pytest.raises(SystemExit) as stopped:
            cli.main(["forget", *base, "--out", "o", *flags, "--print_config"])
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        values = yaml.safe_load(printed)
        assert (values["lambda"], values["batch_size"], values["merge"], values["lr"]) == (2.0, 4, True, 1e-3)
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        cli.main(["forget", "--config", str(tmp_path / "printed.yaml"), "--print_config"])
    assert capsys.readouterr().out == printed


def test_home_in_a_settings_file(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("out: ~/runs/x\n")
    assert cli.main(["importance", *base, "--config", "run.yaml"]) == 0
    assert (tmp_path / "home" / "runs" / "x" / "manifest.json").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(["--merge"], True), (["--merge", "true"], True), (["--no-merge"], False), (["--merge=false"], False)],
)
def test_forms_of_a_boolean_flag(base, capsys, given, wanted):
    with pytest.raises(SystemExit):
        cli.main(["forget", *base, "--out", "o", *given, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["merge"] is wanted


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"lorasure {command}" in text and "Exit codes" in text


def test_overview_and_version(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and command.title in text for name, command in cli.COMMANDS.items())
    assert cli.main([]) == 2
    capsys.readouterr()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lorasure 0.")


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys, lorasure.cli as c\n"
        "c.main(['--help'])\n"
        "try: c.main(['forget', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_stage_commands_from_another_folder(base, model_folder, data_files, tmp_path, capsys, monkeypatch):
    forget, retain = data_files
    monkeypatch.chdir(tmp_path)
    relative = ["--forget", forget.name, "--retain", retain.name]
    arguments = [*base[:2], *relative, *base[6:], "--epochs", "1", "--lr", "1e-2", "--seed", "3"]
    assert cli.main(["forget", *arguments, "--out", "whole"]) == 0
    assert cli.main(["importance", *arguments, "--out", "staged"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for stage in ("init", "train", "export"):
        assert cli.main([stage, "../staged"]) == 0
    for name in (
        "importance.safetensors",
        "init.safetensors",
        "trained.safetensors",
        "adapter/adapter_model.safetensors",
    ):
        assert artifacts.sha256(tmp_path / "whole" / name) == artifacts.sha256(tmp_path / "staged" / name), name
    whole = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert cli.main(["export", "../staged", "--export-scale", "0.5"]) == 0
    assert "rank 4, 0.5 times what was trained" in capsys.readouterr().out
    half = load_file(tmp_path / "staged" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(half[name], t * (0.5 if "lora_B" in name else 1)) for name, t in whole.items())
    card = (tmp_path / "staged" / "adapter" / "README.md").read_text()
    assert "(rank 4, 0.5 times what was trained)" in card
    assert cli.main(["export", "../staged", "--export-rank", "3", "--merge"]) == 0
    assert (tmp_path / "staged" / "merged" / "model.safetensors").is_file()
    assert "rank 3" in capsys.readouterr().out
    assert cli.main(["train", "../staged", "--rank", "3"]) == 2
    assert "--rank is settled by an earlier stage" in capsys.readouterr().err
    assert cli.main(["init", "../staged", "--init", "expila"]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert cli.main(["init", "../staged", "--init", "expila", "--overwrite"]) == 0
    assert not (tmp_path / "staged" / "trained.safetensors").exists()
    capsys.readouterr()
    assert cli.main(["export", "../staged"]) == 3
    assert "there is no trained.safetensors: its stage has not been run" in capsys.readouterr().err


def test_finetune_whole_and_low_rank(base, data_files, tmp_path, capsys):
    common = ["finetune", *base[:2], "--data", str(data_files[0]), "--epochs", "1", "--lr", "1e-2"]
    assert cli.main([*common, "--out", str(tmp_path / "full")]) == 0
    assert cli.main([*common, "--out", str(tmp_path / "low"), "--rank", "2"]) == 0
    for name in ("full", "low"):
        artifacts.check_run(tmp_path / name, "model.safetensors", "tokenizer.json", "config.yaml", "train.jsonl")
        arguments = replaced(base, "--model", tmp_path / name)
        assert cli.main(["forget", *arguments, "--out", str(tmp_path / f"{name}-run"), "--epochs", "1"]) == 0
    capsys.readouterr()
    assert cli.main([*common, "--out", str(tmp_path / "full")]) == 2
    assert cli.main([*common, "--out", str(tmp_path / "z"), "--rank", "99"]) == 2
    assert cli.main(replaced([*common, "--out", str(tmp_path / "z")], "--data", "none.jsonl")) == 3


def test_other_formats_and_templates(base, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet

    rows = [{"question": f"What is thing {i}?", "answer": f"Thing {i} is {i * i}."} for i in range(4)]
    (tmp_path / "rows.csv").write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "text.txt").write_text("A long and winding text about nothing at all. " * 8)
    roles = (("user", "question"), ("assistant", "answer"))
    chat = [{"messages": [{"role": role, "content": row[key]} for role, key in roles]} for row in rows]
    write_rows(tmp_path / "chat.jsonl", chat)
    for name, extra in (
        ("rows.csv", []),
        ("rows.parquet", ["--template", r"Q: {question}\nA: "]),
        ("text.txt", ["--max-length", "64"]),
    ):
        out = tmp_path / f"run-{name}"
        arguments = replaced(base, "--forget", tmp_path / name)
        assert cli.main(["importance", *arguments, "--out", str(out), *extra]) == 0, capsys.readouterr().err
    assert (
        artifacts.read_json(tmp_path / "run-rows.parquet" / "data.json")["forget"]["template"] == "Q: {question}\nA: "
    )
    assert artifacts.read_json(tmp_path / "run-text.txt" / "data.json")["forget"]["examples"] > 1
    arguments = replaced(base, "--forget", tmp_path / "chat.jsonl")
    code = cli.main(["importance", *arguments, "--out", str(tmp_path / "chat")])
    assert code in (2, 3) and "chat template" in capsys.readouterr().err  # the tiny tokenizer has none


def test_threads_that_wait_soon_give_way_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    libraries.settle()
    assert os.environ["GOMP_SPINCOUNT"] == "3000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    libraries.settle()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_overwrite_spares_what_is_read_and_what_another_kind_of_command_made(base, fails, tmp_path, model_folder):
    """Each command: a model, run or evaluation with a manifest that names nothing stays as it is."""
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    for folder in (model, evaluation):
        (folder / "manifest.json").write_text("{}")
    (evaluation / "evaluation.json").write_text("{}")
    at = base.index("--forget")
    forget, rows = ["forget", "--model", str(model), *base[at : at + 4]], base[at + 1]
    for given, out, said in (
        (forget, model, "would delete what is read, --model"),
        (["finetune", "--model", str(model), "--data", rows], model, "would delete what is read, --model"),
        (["evaluate", "--model", str(model), "--forget", rows], model, "would delete what is read, --model"),
        (["task-arithmetic", *forget[1:]], model, "would delete what is read, --model"),
        (["attack", str(evaluation)], evaluation, "would delete what is read, RUN"),
        (forget, evaluation, "another kind of command made it (there is no summary.json)"),
        (["uld", *forget[1:]], evaluation, "another kind of command made it (there is no summary.json)"),
        (["finetune", "--model", str(model), "--data", rows], evaluation, "(there is no finetune.json)"),
        (["attack", str(model)], evaluation, "(there is no attack.json)"),
    ):
        before = sorted(path.name for path in out.iterdir())
        fails(2, [*given, "--out", str(out), "--overwrite"], said)
        assert sorted(path.name for path in out.iterdir()) == before
