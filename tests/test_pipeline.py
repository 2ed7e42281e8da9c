"""The pipeline end to end on the tiny model: what is written, that it is right, and that a failure leaves nothing."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from architectures import tiny_model
from conftest import write_rows
from lorasure import artifacts, check, finetuning, folders, lora, pipeline, progress, stages, train
from lorasure.check import check_export
from lorasure.config import FinetuneSettings, ForgetSettings
from lorasure.errors import DataError, NumericError, UsageError
from lorasure.init.apply import INITS
from lorasure.losses.forget import FORGET_LOSSES
from lorasure.losses.tokens import Answers
from lorasure.progress import Reporter

FILES = {
    "config.yaml",
    "data.json",
    "identity.json",
    "importance.safetensors",
    "init.safetensors",
    "trained.safetensors",
    "train.jsonl",
    "summary.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/README.md",
}


@pytest.fixture
def settings(model_folder, data_files, tmp_path):
    """Settings of a short run; keyword arguments override them."""
    forget, retain = map(str, data_files)
    common = {
        "model": str(model_folder),
        "forget": forget,
        "retain": retain,
        "rank": 2,
        "epochs": 2,
        "lr": 1e-2,
        "init": "vila",
    }

    def make(out="run", **options):
        return ForgetSettings(**common | {"out": str(tmp_path / out)} | options)

    return make


def adapter_hash(result):
    return artifacts.sha256(result.adapter / "adapter_model.safetensors")


def test_a_run_has_all_its_files_and_a_right_manifest(settings):
    run = pipeline.forget(settings()).folder
    listed = artifacts.read_json(run / "manifest.json")["files"]
    found = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert found == FILES | {"manifest.json"} and listed.keys() == FILES
    for name, about in listed.items():
        assert about == {"sha256": artifacts.sha256(run / name), "bytes": (run / name).stat().st_size}


def test_summary(settings):
    result = pipeline.forget(settings())
    stored = artifacts.read_json(result.folder / "summary.json")
    assert stored == json.loads(json.dumps(result.summary))
    assert {"before", "after", "base", "settings", "export", "seconds", "peak_memory_bytes", "verdict"} <= stored.keys()
    assert stored["before"]["forget"]["n"] == 6 and stored["after"]["retain"]["n"] == 10
    assert stored["export"]["rank"] == 4
    assert stored["export"]["max_logit_difference"] <= stored["export"]["bound"] == 1e-4
    lines = [json.loads(line) for line in (result.folder / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(math.isfinite(line["forget"]) for line in lines)


def test_only_the_user_can_read_the_run_and_no_file_holds_the_text(settings, tmp_path):
    secret = "Quillfeather"
    rows = [{"question": f"Who is {secret} {i}?", "answer": f"{secret} is {i}."} for i in range(3)]
    path = write_rows(tmp_path / "secret.jsonl", rows)
    run = pipeline.forget(settings(forget=str(path), loss="dpo")).folder
    for file in [run, *run.rglob("*")]:
        assert file.stat().st_mode & 0o077 == 0, file
        assert file.is_dir() or secret.encode() not in file.read_bytes(), file


def test_the_adapter_needs_nothing_of_ours(settings, model_folder):
    result = pipeline.forget(settings())
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        original = base(ids).logits
        changed = PeftModel.from_pretrained(base, result.adapter)(ids).logits
    assert (original - changed).abs().max() > 1e-3


def test_the_base_is_never_written(settings, model_folder):
    before = {p: artifacts.sha256(p) for p in model_folder.iterdir()}
    pipeline.forget(settings(merge=True))
    assert before == {p: artifacts.sha256(p) for p in model_folder.iterdir()}


def test_a_stage_without_a_terminal_says_where_it_is(capsys, monkeypatch):
    clock = itertools.count(step=40)  # seconds
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with Reporter().stage("train", 4, "steps") as advance:
        for _ in range(4):
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "train        2 of 4 steps",
        "train        4 of 4 steps",
        "train        4 steps in 280.0 s (0 steps/s)",
    ]


def test_merged_weights_equal_base_and_adapter(settings, model_folder):
    result = pipeline.forget(settings(merge=True))
    ids = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    merged = AutoModelForCausalLM.from_pretrained(result.folder / "merged")
    with torch.no_grad():
        torch.testing.assert_close(
            merged(ids).logits, PeftModel.from_pretrained(base, result.adapter)(ids).logits, atol=1e-4, rtol=0
        )


def test_whole_models_that_are_written_have_the_configuration_of_the_base(settings, model_folder, tmp_path):
    """With its key-value cache, too: others generate with them."""
    base = artifacts.read_json(model_folder / "config.json")
    merged = pipeline.forget(settings(merge=True, epochs=1)).folder / "merged"
    given = {"model": str(model_folder), "data": settings().retain, "epochs": 1, "out": str(tmp_path / "tuned")}
    tuned = finetuning.finetune(FinetuneSettings(**given))
    assert base["use_cache"] is True
    assert artifacts.read_json(merged / "config.json") == artifacts.read_json(tuned / "config.json") == base


def test_same_seed_same_bytes_and_batching_changes_only_rounding(settings):
    one, two = (pipeline.forget(settings(name)) for name in ("one", "two"))
    other_seed = pipeline.forget(settings("three", seed=1))
    assert adapter_hash(one) == adapter_hash(two) != adapter_hash(other_seed)
    split = pipeline.forget(settings("four", tokens_per_batch=80))
    for name, value in one.summary["after"].items():
        assert split.summary["after"][name]["value"] == pytest.approx(value["value"], rel=1e-3)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("coverage", [1.0, 0.25])
def test_every_init_alone_and_by_stages(settings, init, coverage):
    options = {"init": init, "coverage": coverage, "epochs": 1}
    if coverage < 1 and INITS[init].evidence != "importance":
        options |= {"score": "variance", "space": "lora"}
    whole = pipeline.forget(settings("whole", **options))
    staged = settings("staged", **options)
    run = pipeline.importance_command(staged)
    pipeline.init_command(run, staged)
    pipeline.train_command(run, staged)
    assert adapter_hash(whole) == adapter_hash(pipeline.export_command(run, staged))


def test_a_stage_throws_what_was_trained_away_only_when_told(settings):
    plain, again = (settings("done", init="lora", epochs=1, overwrite=told) for told in (False, True))
    run = pipeline.forget(plain).folder
    for command in (pipeline.init_command, pipeline.train_command):
        with pytest.raises(UsageError, match=r"holds trained\.safetensors, which would go; add --overwrite"):
            command(run, plain)
    folders.verify(run)
    pipeline.train_command(run, again)
    assert (run / "trained.safetensors").exists() and not (run / "adapter").exists()


def test_importance_that_was_never_measured_is_said(settings):
    notes = []
    reporter = Reporter(quiet=True)
    reporter.note = notes.append
    run = pipeline.importance_command(settings("start", init="contrast"), reporter)
    assert "--init contrast needs no importance, so none was measured." in notes
    with pytest.raises(DataError, match="no importance was measured there"):
        pipeline.forget(settings("other", init="vila", importance=str(run)))


@pytest.mark.parametrize("loss", FORGET_LOSSES)
def test_every_loss(settings, loss):
    summary = pipeline.forget(settings(loss=loss, epochs=1)).summary
    assert math.isfinite(summary["after"]["forget"]["value"])


HALF = [{"init": init} for init in ("vila", "sketch", "reglu", "lora", "fila")] + [
    {"loss": loss} for loss in ("npo", "kl")
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", HALF, ids=str)
def test_half_precision_bases(settings, dtype, options):
    check_half(pipeline.forget(settings(dtype=dtype, epochs=1, **options)), options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_half_precision_experts_and_transposed_weights(settings, tokenizer, tmp_path, name, dtype):
    tiny_model(name).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    options = {"loss": "kl"}
    check_half(pipeline.forget(settings(model=str(tmp_path / name), dtype=dtype, epochs=1, **options)), options)


def check_half(result, options):
    """The adapter is float32 and exact; KL at the first step is that of a start that is the original model."""
    export, log = result.summary["export"], (result.folder / "train.jsonl").read_text()
    assert export["max_logit_difference"] <= export["bound"] / 8
    assert result.summary["after"]["forget"] != result.summary["before"]["forget"]
    assert {t.dtype for t in load_file(result.adapter / "adapter_model.safetensors").values()} == {torch.float32}
    if options.get("loss") == "kl":
        assert abs(json.loads(log.splitlines()[0])["retain"]) < 1e-3


@pytest.mark.parametrize("init", ["vila", "fila"])
def test_published_arithmetic(settings, init):
    mine, theirs = (pipeline.forget(settings(str(c), init=init, compat=c)) for c in (None, "paper-code"))
    assert adapter_hash(mine) != adapter_hash(theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"score": "fisher", "space": "full"},
        {"score": "absolute", "space": "lora"},
        {"init": "sketch", "probe_rank": 3},
        {"solver": "rows-and-columns", "init": "sketch"},
        {"split": "published", "pairing": "cyclic", "retain_rows": 3},
    ],
    ids=str,
)
def test_other_settings(settings, options):
    assert pipeline.forget(settings(**options, epochs=1)).summary["export"]["rank"] == 4


def test_a_chat_model_end_to_end_on_questions_and_on_messages(settings, model_folder, tmp_path):
    chat = tmp_path / "chat"
    shutil.copytree(model_folder, chat)
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    pairs = [(f"Who is number {i}?", f"It is person {i * 7}.") for i in range(8)]
    forms = {
        "questions": lambda q, a: {"question": q, "answer": a},
        "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    }
    hashes = set()
    for name, form in forms.items():
        rows = [form(*pair) for pair in pairs]
        files = [str(write_rows(tmp_path / f"{name}{i}.jsonl", part)) for i, part in enumerate((rows[:3], rows[3:]))]
        result = pipeline.forget(settings(name, model=str(chat), forget=files[0], retain=files[1], loss="dpo"))
        assert artifacts.read_json(result.folder / "data.json")["forget"]["template"] == "chat"
        hashes.add(adapter_hash(result))
    assert len(hashes) == 1  # the same tokens


def test_running_text_end_to_end(settings, tmp_path):
    for name in ("secret", "kept"):
        (tmp_path / f"{name}.txt").write_text(f"A {name} story of a town by the sea. " * 12)
    files = {"forget": str(tmp_path / "secret.txt"), "retain": str(tmp_path / "kept.txt")}
    summary = pipeline.forget(settings(**files, max_length=64, loss="npo", retain_loss="kl")).summary
    assert summary["before"]["forget"]["n"] > 5 and summary["after"]["forget"] != summary["before"]["forget"]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"loss": "dpo"}, "no question to refuse"), ({"pairing": "modular"}, "needs a group for every row")],
)
def test_what_training_cannot_use_is_refused_before_anything_is_measured(
    settings, tmp_path, monkeypatch, options, said
):
    (tmp_path / "f.txt").write_text("Some text.")
    monkeypatch.setattr(pipeline, "measure_importance", lambda *_: pytest.fail("measured"))
    with pytest.raises((DataError, UsageError), match=said):
        pipeline.forget(settings(forget=str(tmp_path / "f.txt"), **options))
    assert not (tmp_path / "run").exists()


def test_the_seconds_of_a_run_are_its_own(settings):
    reporter = Reporter(quiet=True)
    with reporter.stage("train"):
        pass
    reporter.seconds["train"] = 1e6  # of something else that was shown there before
    for name in ("first", "second"):
        found = pipeline.forget(settings(name, init="contrast"), reporter).summary["seconds"]
        assert {"load model", "activations", "init", "train", "export", "evaluate"} <= found.keys()
        assert sum(found.values()) < 1e6
    assert reporter.seconds == {"train": 1e6}


def test_the_seconds_of_a_run_are_those_of_all_its_commands(settings, monkeypatch):
    """What was spent before an interruption, and by earlier stages."""
    real, seen = train._backward, []

    def stopped(*args):
        if not (found := artifacts.read_json(partial / "summary.json")["seconds"]).get("train"):
            seen.append(found)
            raise KeyboardInterrupt
        return real(*args)

    def later(seconds, *gone):
        before = {stage: took for stage, took in seen[-1].items() if stage not in gone}
        assert seconds.keys() >= before.keys() and all(seconds[stage] >= took for stage, took in before.items())
        seen.append(seconds)

    partial = Path(settings().out).with_name(".run.partial")
    with monkeypatch.context() as patch:
        patch.setattr(train, "_backward", stopped)
        with pytest.raises(KeyboardInterrupt):
            pipeline.forget(settings())
        later(artifacts.read_json(partial / "summary.json")["seconds"])
        assert seen[-1]["train"] > 0
        run = pipeline.forget(settings(resume=True)).folder
    later(artifacts.read_json(run / "summary.json")["seconds"])
    export, train_anew = ("export", "evaluate"), ("reference", "train", "export", "evaluate")
    for command, gone in (
        (pipeline.export_command, export),
        (pipeline.init_command, ("init", *train_anew)),
        (pipeline.train_command, train_anew),
        (pipeline.train_command, train_anew),
        (pipeline.export_command, export),
    ):
        path = run / "summary.json"  # what is made anew has only the seconds of the last time
        artifacts.write_json(
            path, (summary := artifacts.read_json(path)) | {"seconds": summary["seconds"] | dict.fromkeys(gone, 1e6)}
        )
        artifacts.write_manifest(run)
        command(run, settings(overwrite=True))
        later(artifacts.read_json(path)["seconds"], *gone)
        assert seen[-1]["load model"] > seen[-2]["load model"] and max(seen[-1].values()) < 1e6


def test_a_stage_within_a_stage_is_not_counted_twice():
    reporter = Reporter(quiet=True)
    began = time.perf_counter()
    with reporter.stage("init"), reporter.stage("activations"):
        time.sleep(0.1)
    assert 0.1 <= reporter.seconds["activations"] <= sum(reporter.seconds.values()) <= time.perf_counter() - began


def test_importance_of_an_earlier_run(settings, data_files):
    first = pipeline.forget(settings("first"))
    again = pipeline.forget(settings("again", importance=str(first.folder)))
    assert adapter_hash(first) == adapter_hash(again) and "importance" not in again.summary["seconds"]
    with data_files[0].open("a") as file:
        file.write('{"question": "new", "answer": "row"}\n')
    with pytest.raises(DataError, match="measured on another forget"):
        pipeline.forget(settings("third", importance=str(first.folder)))
    with pytest.raises(DataError, match="the rows have changed"):
        pipeline.train_command(first.folder, settings("first"))


def test_the_start_of_a_run_from_the_importance_of_another(settings):
    """It is used, and refused where it was measured on other rows; so is what the start would make no use of."""
    measured = pipeline.importance_command(settings("measured"))
    pipeline.init_command(measured, settings("measured"))
    other = pipeline.importance_command(settings("other", init="contrast"))
    pipeline.init_command(other, settings("other", importance=str(measured)))
    starts = [artifacts.sha256(run / artifacts.START) for run in (measured, other)]
    assert starts[0] == starts[1] and artifacts.differences(other) == []
    assert artifacts.sha256(other / artifacts.IMPORTANCE) == artifacts.sha256(measured / artifacts.IMPORTANCE)
    fewer = pipeline.importance_command(settings("fewer", retain_rows=2))
    kept = artifacts.read_manifest(fewer)
    with pytest.raises(DataError, match=r"--importance.*measured"):
        pipeline.init_command(fewer, settings("fewer", retain_rows=2, importance=str(measured)))
    with pytest.raises(UsageError, match="--solver elementwise: --init lora makes no use of it"):
        pipeline.init_command(fewer, settings("fewer", retain_rows=2, init="lora", solver="elementwise"))
    assert artifacts.read_manifest(fewer) == kept and artifacts.differences(fewer) == []
    measured.rename(measured.with_name("elsewhere"))  # what needs it no more goes on without it
    given = {"importance": str(measured)}
    pipeline.train_command(other, settings("other", **given))
    assert pipeline.export_command(other, settings("other", **given)).summary["after"]
    with pytest.raises(UsageError, match="there is no such run folder"):
        pipeline.init_command(fewer, settings("fewer", retain_rows=2, **given))
    with pytest.raises(UsageError, match="there is no such run folder"):
        pipeline.forget(settings("new", **given))


def test_a_stage_refuses_what_an_earlier_one_settled_and_other_files(settings):
    run = pipeline.forget(settings()).folder
    for options in ({"seed": 1}, {"rank": 3}, {"init": "pissa"}, {"max_length": 99}):
        with pytest.raises(UsageError, match="settled by an earlier stage"):
            pipeline.train_command(run, settings(**options))
    path = run / "init.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match="changed after it was written"):
        pipeline.train_command(run, settings())


def test_an_export_of_a_run_keeps_what_the_run_said_of_itself(settings, tmp_path, monkeypatch):
    """Its utility, level, interruptions, changes and guards, of which nothing is made again."""
    unseen = str(
        write_rows(tmp_path / "unseen.jsonl", [{"question": "Who?", "answer": f"Nobody {i}."} for i in (1, 2)])
    )
    options = {"min_utility": 0.5, "stop": "auto", "unseen": unseen, "epochs": 3, "targets": "layers.1.*"}
    real, calls = train._backward, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_backward", stopped)
        pipeline.forget(settings(checkpoint_every=1, **options))
    options["min_utility"] = 0.6
    before = pipeline.forget(settings(**options, resume=True, allow_change="min_utility")).summary
    kept = ("before", "utility", "stop", "prefix", "resumed", "changed", "guards")
    assert all(before[key] for key in kept)
    after = pipeline.export_command(tmp_path / "run", settings(**options, export_scale=0.5)).summary
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert after["export"]["scale"] == 0.5 and after["after"] != before["after"]
    again = pipeline.export_command(tmp_path / "run", settings(**options)).summary
    assert {key: again[key] for key in kept} == {key: before[key] for key in kept}


@pytest.mark.fault(
    "the exported adapter damaged on its way to the disk",
    "P3",
    "exit code 4; the training is kept",
    "check.py: check_export compares nothing",
)
def test_a_damaged_adapter_fails_the_check_and_the_training_is_kept(settings, tmp_path, monkeypatch):
    save = lora.save_adapter

    def damaging(wrapped, *args):
        with torch.no_grad():
            layer = next(p for name, p in wrapped.named_parameters() if "lora_A" in name)
            kept = layer.clone()
            layer += 1
            save(wrapped, *args)
            layer.copy_(kept)

    done = pipeline.forget(settings("done"))
    before = {p: artifacts.sha256(p) for p in tmp_path.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(lora, "save_adapter", damaging)
        with pytest.raises(NumericError, match="differs from the trained model"):
            pipeline.forget(settings("never"))
        with pytest.raises(NumericError, match="differs from the trained model"):
            pipeline.export_command(done.folder, settings("done"))
        with pytest.raises(NumericError):
            pipeline.forget(settings("done", overwrite=True))
    assert before == {p: artifacts.sha256(p) for p in before}
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".done.partial", ".never.partial"]
    for name in ("done", "never"):  # the training was sound, so it is not lost
        trained = artifacts.read_json(tmp_path / f".{name}.partial" / "summary.json")["seconds"]["train"]
        resumed = pipeline.forget(settings(name, resume=True))
        assert adapter_hash(resumed) == adapter_hash(done) and resumed.summary["seconds"]["train"] == trained
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("options", [{}, {"init": "lora"}, {"dtype": "bfloat16"}], ids=str)
def test_an_adapter_that_is_not_what_was_trained_is_not_handed_over(settings, monkeypatch, options):
    """It is saved and loaded as it is, so a comparison with itself would say nothing."""
    bake = lora.bake
    for scale in (0.0, 0.4, 2.0):
        with monkeypatch.context() as patch:
            patch.setattr(lora, "bake", lambda wrapped, _, scale=scale: bake(wrapped, scale))
            with pytest.raises(NumericError, match="export: the adapter to hand over differs from the trained one"):
                pipeline.forget(settings(str(scale), lr=0.1, **options))
    pipeline.forget(settings("asked", lr=0.1, export_scale=0.4, **options))
    pipeline.forget(settings("smaller", lr=0.1, export_rank=1, **options))


def found_on(logits):
    """Answers of which the states are the logits."""
    return Answers(logits, torch.zeros(len(logits), dtype=torch.int64), torch.zeros(len(logits), dtype=torch.int64), 1)


def test_check_export_bounds():
    """Of several rows and chunks of rows; what is not finite on one side only is a difference, too."""
    logits = torch.tensor([[1.0, 100.0]]).repeat(600, 1)
    rows = [logits[:1], logits]
    assert check_export(rows, [found_on(row + 5e-5) for row in rows], torch.float32)["bound"] == 1e-4
    for place, value in ((0, 1e-2), (300, 1e-2), (599, 1e-2), (0, float("nan")), (599, float("inf"))):
        other = logits.clone()
        other[place, 1] += value
        with pytest.raises(NumericError):
            check_export(rows, [found_on(logits[:1]), found_on(other)], torch.float32)
        with pytest.raises(NumericError):
            check_export([logits[:1], other], map(found_on, rows), torch.float32)
    assert check_export(rows, [found_on(row + 1) for row in rows], torch.bfloat16)["bound"] > 1
    with pytest.raises(NumericError):
        check_export([logits / 0], [found_on(logits)], torch.bfloat16)


def test_the_check_holds_logits_of_few_tokens_of_one_row_only(settings, data_files, monkeypatch):
    """As training does: each row in a pass of its own, and ROWS of its answer tokens at a time."""
    long = write_rows(
        data_files[0].parent / "long.jsonl", [{"question": f"{i}?", "answer": "Nobody " * 14} for i in (1, 2)]
    )
    monkeypatch.setattr(check, "ROWS", 10)
    batches, chunks = [], []
    real, logits_of = check.collate, Answers.logits_of
    monkeypatch.setattr(check, "collate", lambda examples: batches.append(len(examples)) or real(examples))
    monkeypatch.setattr(
        Answers, "logits_of", lambda self, states: chunks.append(len(states)) or logits_of(self, states)
    )
    monkeypatch.setattr(stages, "score_sets", lambda *_: pytest.fail("reached"))
    with pytest.raises(pytest.fail.Exception):
        pipeline.forget(settings(forget=str(long)))
    assert set(batches) == {1} and max(chunks) <= 256 and chunks.count(10) > 10


@pytest.mark.parametrize(
    ("forget", "retain", "known", "harmed", "said"),
    [
        (
            0.8,
            0.9,
            True,
            False,
            "Try `lorasure export RUN --export-scale 1`, then a higher learning rate (--lr 0.0003)",
        ),
        (0.1, 0.5, False, True, "retain set suffered. Try `lorasure export RUN --export-scale 0.81`, a lower"),
        (0.1, 0.9, False, False, "is forgotten"),
    ],
)
def test_verdict(forget, retain, known, harmed, said):
    def scores(f, r):
        return {"forget": {"value": f}, "retain": {"value": r}}

    given = {"lr": 1e-4, "loss": "bga", "retain_loss": None}
    summary = {"before": scores(0.9, 0.9), "after": scores(forget, retain), "settings": given}
    summary |= {"export": {"scale": 0.9}}
    found = stages.verdict(summary)
    assert (found["still_known"], found["retain_harmed"]) == (known, harmed) and said in found["text"]
    whole = stages.verdict(summary | {"export": {"scale": 1.0}})["text"]
    assert not known or "still known. Try a higher learning rate" in whole
    smaller = stages.verdict(summary | {"export": {"scale": 1.0, "kept_energy": 0.2}})["text"]
    assert not known or "Try `lorasure export RUN --export-rank null`, then a higher" in smaller
    for changes in ({"retain_loss": "none"}, {"loss": "ga"}):  # neither --lambda nor retain rows would change anything
        alone = stages.verdict(summary | {"settings": given | changes})["text"]
        assert not harmed or ("--retain-loss nll" in alone and "--lambda" not in alone)
    summary["before"]["forget"]["value"] = 0.001
    assert "hardly known before, so this measure shows nothing" in stages.verdict(summary)["text"]
