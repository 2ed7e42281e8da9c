"""Two processes on one machine give the run of one up to rounding, also where each keeps half of the weights.

By torchrun and by what is in examples/distributed/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conftest import random_examples, tiny_llama
from lorasure import artifacts, cli, models, processes, stages, train_stage
from lorasure.errors import ResourceError, UsageError
from lorasure.memory import within_memory

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "distributed"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", 2, "--main_process_port", 0, "--config_file"]
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "ddp": [*ACCELERATE, EXAMPLES / "ddp.yaml"],
    "fsdp2": [*ACCELERATE, EXAMPLES / "fsdp2.yaml"],
}
EXCLUDED = ["--exclude", "o_proj,gate_proj,up_proj"]
RUNS = [
    ("torchrun", ["--init", "vila"]),
    ("torchrun", ["--init", "contrast"]),
    # A cached prefix. Left out are layers whose outputs differ in few directions: which others come in is rounding.
    ("ddp", ["--init", "reglu", "--loss", "npo", "--retain-loss", "kl", "--targets", "layers.1.*", *EXCLUDED]),
    ("fsdp2", ["--gradient-checkpointing", "true", "--init", "contrast", "--loss", "npo", "--retain-loss", "kl"]),
    ("fsdp2", ["--init", "fila", "--coverage", 0.5, "--tokens-per-batch", 1000]),  # one micro-batch, which is halved
]


def launched(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "options"), RUNS, ids=str)
def test_two_processes_give_the_run_of_one(tmp_path, model_folder, data_files, launcher, options):
    given = ["--model", model_folder, "--forget", data_files[0], "--retain", data_files[1], "--epochs", 2]
    given += ["--batch-size", 3, "--rank", 4, "--lr", "1e-2", "--tokens-per-batch", 64, *options]
    assert cli.main(["forget", *map(str, given), "--out", str(tmp_path / "one")]) == 0
    done = launched(*LAUNCHERS[launcher], "-m", "lorasure", "forget", *given, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("adapter:") == 1  # only the first process talks
    for name in (artifacts.IMPORTANCE, artifacts.START, artifacts.TRAINED, "adapter/adapter_model.safetensors"):
        if not (tmp_path / "one" / name).exists():
            continue
        one, two = (load_file(tmp_path / run / name) for run in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(
                one[key], two[key], rtol=1e-5, atol=1e-5, msg=lambda text, at=f"{name}, {key}": f"{at}: {text}"
            )
    logs = [(tmp_path / run / artifacts.LOG).read_text().splitlines() for run in ("one", "two")]
    for a, b in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert a["forget"] == pytest.approx(b["forget"], rel=1e-5) and a["tokens"] == b["tokens"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["one", "two"]  # nothing of the second process


def test_resuming_wants_one_process(monkeypatch, tmp_path, model_folder, data_files, capsys):
    monkeypatch.setattr(processes, "size", lambda: 2)
    given = ["--model", model_folder, "--forget", data_files[0], "--retain", data_files[1], "--resume", "true"]
    assert cli.main(["forget", *map(str, given), "--out", str(tmp_path / "run")]) == 2
    assert "--resume goes on in one process" in capsys.readouterr().err


HALF = """
import sys, torch
from lorasure import models, processes
with processes.joined():
    model = models.load_model(sys.argv[1], dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(7)[None]
    before = sum(p.to_local().numel() for p in model.model.layers.parameters())
    logits = model(input_ids=ids).logits
    torch.save((before, logits), f"{sys.argv[2]}/{processes.rank()}.pt")
    assert before == sum(p.to_local().numel() for p in model.model.layers.parameters())
"""


@pytest.mark.slow
def test_each_process_keeps_half_of_the_layers_and_computes_the_same(tmp_path, model_folder):
    script = tmp_path / "half.py"
    script.write_text(HALF)
    done = launched(*TORCHRUN, script, model_folder, tmp_path, ACCELERATE_USE_FSDP="true")
    assert done.returncode == 0, done.stderr[-2000:]
    model = tiny_llama()
    weights = sum(p.numel() for p in model.model.layers.parameters())
    expected = model(input_ids=torch.arange(7)[None]).logits
    for rank in range(2):
        kept, logits = torch.load(tmp_path / f"{rank}.pt")
        assert kept == weights // 2
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


UNEVEN = """
import json, sys
from dataclasses import replace
from lorasure import errors, fitting, processes
from lorasure.config import ForgetSettings
from lorasure.footprint import peak
from lorasure.workbench import Workbench
found = {}
with processes.joined():
    bench = Workbench(ForgetSettings(**json.loads(sys.argv[1])))
    needs, whole = fitting.footprint(bench), bench.token_budget
    rooms = {b: peak(replace(needs, token_budget=b).parts(), "host")[1] for b in (whole, whole // 2)} | {0: 1000}
    for least in rooms:  # the second process has this much, the first has room for all
        bench.token_budget = whole
        fitting.free_memory = lambda device: {"host": rooms[least if processes.rank() else whole]}
        try:
            fitting.fit_memory(bench)
            found[least] = bench.token_budget
        except errors.ResourceError as error:
            found[least] = str(error)
    json.dump(found, open(f"{sys.argv[2]}/{processes.rank()}.json", "w"))
"""


@pytest.mark.slow
def test_processes_with_different_memory_take_passes_of_one_size(tmp_path, model_folder, data_files):
    """They deal out the same list of passes: with lists of their own, rows would be taken twice or never."""
    script = tmp_path / "uneven.py"
    script.write_text(UNEVEN)
    given = {"model": model_folder, "forget": data_files[0], "retain": data_files[1], "out": tmp_path / "run"}
    done = launched(*TORCHRUN, script, json.dumps({name: str(path) for name, path in given.items()}), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    sizes = [size for size in first if size != "0"]
    assert len(sizes) == 2 and all(first[size] == second[size] == int(size) for size in sizes)
    assert "another of the processes has too little memory" in first["0"] and "needs" in second["0"]


@pytest.fixture
def of_three(monkeypatch):
    """This process is the second of three, which share out the weights."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(processes, "size", lambda: 3)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    return monkeypatch


def test_every_process_takes_as_many_micro_batches_and_every_row_is_taken_once(of_three):
    for groups in ([[0, 1, 2, 3]], [[3, 1], [2, 0], [5], [4]], [[0], [1], [2]]):
        shares = []
        for rank in range(3):
            of_three.setattr(processes, "rank", lambda rank=rank: rank)
            shares.append(processes.share(groups))
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for group in share for i in group) == sorted(
            i for group in groups for i in group
        )
    with pytest.raises(UsageError, match="2 rows cannot be shared out evenly to 3 processes"):
        processes.share([[0], [1]])
    of_three.delenv("ACCELERATE_USE_FSDP")
    assert processes.share([[0, 1]]) == []


def test_what_cannot_be_shared_out_is_refused(of_three, model_folder, data_files, tmp_path):
    from lorasure.config import ForgetSettings
    from lorasure.workbench import check_names

    given = {"model": str(model_folder), "forget": str(data_files[0]), "retain": str(data_files[1]), "out": "x"}
    with pytest.raises(UsageError, match="--merge needs the base as a whole"):
        check_names(ForgetSettings(**given, merge=True))
    of_three.setenv("WORLD_SIZE", "3")
    of_three.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"DeepSpeed is not supported.*fsdp2\.yaml"), processes.joined():
        pass


@pytest.mark.parametrize(
    ("name", "found"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu"), ("xpu", None)]
)
def test_each_process_takes_an_accelerator_of_its_own(monkeypatch, name, found):
    """All would share the first one otherwise. A number that the user gave stays."""
    monkeypatch.setattr(models.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(models.torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(models.torch.accelerator, "device_count", lambda: 2)
    current: list[int] = []
    monkeypatch.setattr(models.torch.accelerator, "set_device_index", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    alone = torch.device("cuda" if name == "auto" else name)
    if found:
        assert models.pick_device(name) == alone
    monkeypatch.setenv("LOCAL_RANK", "1")
    if found:
        assert models.pick_device(name) == torch.device(found)
        assert current == [torch.device(found).index] * (1 + (name == "cuda:0")) or name == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")  # a process more than there are accelerators
    if found == "cuda:1" or not found:
        with pytest.raises(UsageError, match=f"--device {name}: there is no such device here"):
            models.pick_device(name)


@pytest.mark.parametrize(("gpu", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_sums_on_the_host_have_a_backend_also_beside_a_gpu(monkeypatch, gpu, backend):
    begun = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(processes.dist, "init_process_group", begun.append)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: None)
    with processes.joined():
        assert begun == [backend]


def test_all_processes_decide_by_what_the_first_one_measured(monkeypatch):
    """--lr auto, --stop auto and --min-utility: one that ended its ramp a step early would leave the others waiting."""
    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes.dist, "broadcast", lambda tensor, source: tensor.fill_(0.25))
    monkeypatch.setattr(stages, "_records_of", lambda _, __, rows: {e: SimpleNamespace(mean_nll=1.0) for e in rows})
    rows = random_examples(2)
    assert stages.mean_nll(None, None, rows) == train_stage._mean(None, None, rows) == 0.25


def test_out_of_memory_in_one_of_several_processes_is_not_tried_again_alone(of_three):
    def attempt(token_budget):
        raise MemoryError

    with pytest.raises(ResourceError, match=r"train: out of memory.*--tokens-per-batch"):
        within_memory(attempt, 100, [5, 5], "train", lambda _: None)
