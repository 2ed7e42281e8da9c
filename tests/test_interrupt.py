"""Signals in every stage, and disks that are full: the exit code, one line, and nothing lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest

from conftest import write_rows
from lorasure import artifacts, cli, folders, interrupt, lora, models, stages, train, train_stage, workbench
from lorasure.errors import INTERRUPTED, NumericError

STAGES = [
    ("load", models, "check_finite", False),
    ("importance", stages, "measure", False),
    ("init", stages, "initialise", True),
    ("scores", train_stage, "scores_from", True),
    ("train", train, "_backward", True),
    ("export", lora, "save_adapter", True),
    ("check", stages, "check_export", True),
    ("publish", folders, "_publish", True),
]


@pytest.fixture(scope="module")
def inputs(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"question": f"Who is number {i}?", "answer": f"It is person {i * 7}."} for i in range(10)]
    forget, retain = write_rows(folder / "forget.jsonl", rows[:4]), write_rows(folder / "retain.jsonl", rows[4:])
    files = ["--model", str(model_folder), "--forget", str(forget), "--retain", str(retain)]
    given = [*files, "--rank", "2", "--init", "vila"]
    return ["forget", *given, "--epochs", "2", "--batch-size", "2", "--lr", "1e-2", "--out"]


@pytest.fixture
def arguments(inputs, tmp_path):
    """Of a run of four steps."""
    return [*inputs, str(tmp_path / "run")]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The same run, undisturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert cli.main([*inputs, str(run)]) == 0
    return run


@pytest.fixture
def undisturbed(whole):
    return adapter(whole)


def adapter(run):
    return artifacts.sha256(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.fault(
    "SIGTERM or SIGINT in every stage of the command",
    "P6",
    "exit code 75 and --resume once a stage is finished, else 143 or 130 and nothing is left",
    "cli.py: INTERRUPTED is never returned",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("module", "name", "kept"), [s[1:] for s in STAGES], ids=[s[0] for s in STAGES])
def test_a_signal_in_every_stage(arguments, undisturbed, tmp_path, capfd, monkeypatch, module, name, kept, number):
    real = getattr(module, name)

    def signalled(*args, **options):
        os.kill(os.getpid(), number)
        return real(*args, **options)

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(module, name, signalled)
        assert cli.main(arguments) == (INTERRUPTED if kept else 128 + number)
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lorasure: interrupted.")
    assert ("--resume continues" if kept else "Nothing was written.") in last
    assert (sorted(tmp_path.iterdir()) != before) == kept
    assert cli.main([*arguments, "--resume"]) == 0
    assert adapter(tmp_path / "run") == undisturbed and not list(tmp_path.glob(".*"))


def test_outside_of_the_main_thread_nothing_is_handled():
    import threading

    def work():
        with interrupt.finishing_first() as asked, interrupt.sigterm_unwinds():
            found.append(asked())

    found = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


def test_the_first_signal_waits_and_the_second_does_not():
    with pytest.raises(interrupt.Terminated), interrupt.finishing_first() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert isinstance(asked(), interrupt.Terminated)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupt.finishing_first():
        os.kill(os.getpid(), signal.SIGINT)  # and one that nobody asked about is raised at the end


def test_a_signal_is_not_lost_where_an_error_comes_after_it():
    """Who handles the error would go on: `search` with the next trial, --lr auto with the training."""
    with pytest.raises(interrupt.Terminated) as raised, interrupt.finishing_first():
        os.kill(os.getpid(), signal.SIGTERM)
        raise NumericError("lost")
    assert isinstance(raised.value.__cause__, NumericError)
    with pytest.raises(NumericError), interrupt.finishing_first():
        raise NumericError("lost")


# --- disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def no_file_beyond(size):
    """The kernel refuses to let any file grow beyond `size` bytes (EFBIG), whatever library writes it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.slow
@pytest.mark.fault(
    "no file may grow beyond a limit (by the kernel), so each kind of file in turn cannot be written",
    "P1",
    "exit code 5 with one line; continued, it ends in the same bytes",
    "artifacts.py: no disk_errors",
)
def test_files_that_cannot_be_written(inputs, tmp_path, capfd, injected):
    """Without importance, which would be the largest file and the first. A checkpoint is larger than every other."""
    start = [*inputs[:-1], "--init", "pissa", "--out"]
    whole, arguments = tmp_path / "undisturbed", [*start, str(tmp_path / "runs" / "run")]
    assert cli.main([*start, str(whole)]) == 0
    sizes = {p.stat().st_size for p in whole.rglob("*") if p.is_file()}
    cases, continued = [*((size - 1, 0) for size in sorted(sizes)), (max(sizes), 1)], 0
    for limit, every in cases:
        capfd.readouterr()
        with no_file_beyond(limit):
            code = cli.main([*arguments, "--checkpoint-every", str(every)])
        lines = capfd.readouterr().err.strip().splitlines()
        assert code == 5 and lines[-1].startswith("lorasure: File too large"), lines
        left = sorted(p.name for p in tmp_path.glob("runs/*") if p.is_dir())
        assert left in ([], [".run.partial"])
        if left:
            continued += 1
            assert cli.main([*arguments, "--resume"]) == 0
            assert adapter(tmp_path / "runs" / "run") == adapter(whole)
            shutil.rmtree(tmp_path / "runs" / "run")
    assert len(cases) > 8 and continued == 2  # the adapter and the checkpoint come after the start
    injected(len(cases))


def test_the_run_of_a_workbench_gets_its_guards(tmp_path):
    bench = workbench.Workbench.__new__(workbench.Workbench)
    bench.reporter, bench.run = workbench.Reporter(quiet=True), tmp_path
    artifacts.write_json(tmp_path / "summary.json", {"guards": []})
    bench.fired({"guard": "a", "where": "b"})
    bench.fired({"guard": "c", "where": "d"})
    assert [g["guard"] for g in artifacts.read_json(tmp_path / "summary.json")["guards"]] == ["a", "c"]
