"""`lorasure attack` as a whole command: its folder, the base untouched, resumption, the gate's exit code, mistakes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import tiny_llama, write_rows
from lorasure import artifacts, attacking, cli, lora, pipeline
from lorasure.config import ForgetSettings
from lorasure.data.load import load_data
from lorasure.errors import DataError, NumericError, UsageError
from lorasure.evaluate import attacks
from lorasure.evaluate.attacks import ATTACKS, Attack
from lorasure.forward import answer_records
from lorasure.models import load_tokenizer
from lorasure.yaml_file import read_yaml, write_yaml
from test_attacks import ROWS, SECRET, options

PLAIN = "prefix,quantise"


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """A run that changed the model a little: 12 rows to forget, 6 to keep."""
    folder = tmp_path_factory.mktemp("attacked")
    forget, retain = write_rows(folder / "forget.jsonl", ROWS[:12]), write_rows(folder / "retain.jsonl", ROWS[12:])
    options = {"model": str(model_folder), "forget": str(forget), "retain": str(retain), "out": str(folder / "run")}
    return pipeline.forget(ForgetSettings(**options, init="lora", rank=2, epochs=2, batch_size=4, lr=2e-2)).folder


@pytest.fixture(scope="module")
def retrained(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrained")
    tiny_llama(seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def attack(run, tmp_path, **given):
    return attacking.attack(run, options(**{"out": str(tmp_path / "attacks")} | given))


def named(lines, name, subject="unlearned", point=None):
    return next(x for x in lines if (x["attack"], x["subject"], x["point"]) == (name, subject, point))["scores"]


def probability(model, examples):
    return sum(math.exp(-record.mean_nll) for record in answer_records(model, examples, 512)) / len(examples)


@pytest.fixture(scope="module")
def everything(run, retrained, tmp_path_factory):
    """All attacks on both models: (about, lines, folder, hashes of the models before)."""
    folder = tmp_path_factory.mktemp("all")
    base = read_yaml(run / "config.yaml")["model"]
    before = artifacts.sha256(Path(base) / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "FEW_STEPS", 6)
        patch.setattr(attacks, "CURVE", 2)
        about, lines = attack(run, folder, retrained=str(retrained))
    return about, lines, folder / "attacks", (Path(base) / "model.safetensors", before)


def test_the_folder_holds_what_is_returned_and_a_right_manifest(everything):
    about, lines, folder, _ = everything
    assert artifacts.differences(folder) == []
    assert [json.loads(line) for line in (folder / "attacks.jsonl").read_text().splitlines()] == lines
    stored = artifacts.read_json(folder / "attack.json")
    assert stored["kind"] == "attack" and stored["not_run"] == about["not_run"] and stored["settings"]["rows"] == 8
    assert set(stored["seconds"]) == {f"{x['subject']} {x['attack']}" for x in lines}


def test_every_attack_is_there_for_both_models_or_says_why_not(everything):
    about, lines, *_ = everything
    for subject in ("unlearned", "retrained"):
        ran = {x["attack"] for x in lines if x["subject"] == subject}
        left = {x["attack"] for x in about["not_run"] if x["subject"] == subject}
        assert ran | left == set(ATTACKS) and not ran & left
    assert lines[0]["attack"] == "none" and lines[0]["subject"] == "unlearned"
    assert {(x["attack"], x["subject"]) for x in about["not_run"]} >= {("scale", "retrained")}
    for x in lines:
        for score in x["scores"].values():
            assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1 and score["n"] in (3, 8)


def test_models_are_the_ones_they_are_called(everything, run, retrained):
    """Against the adapter on its base as a user loads it, the base alone, and the retrained model."""
    about, lines, _, (weights, _) = everything
    settings = ForgetSettings.from_dict(read_yaml(run / "config.yaml"))
    every = load_data(settings.forget, settings, load_tokenizer(settings.model)).examples
    examples = [every[i] for i in about["rows"]["scored"]]
    base = AutoModelForCausalLM.from_pretrained(weights.parent).eval()
    other = AutoModelForCausalLM.from_pretrained(retrained).eval()
    assert named(lines, "scale", point=0.0)["probability"]["value"] == pytest.approx(
        probability(base, examples), rel=1e-6
    )
    assert named(lines, "none", "retrained")["probability"]["value"] == pytest.approx(
        probability(other, examples), rel=1e-6
    )
    wrapped = lora.load_adapter(base, run / "adapter")
    unlearned = named(lines, "none")["probability"]["value"]
    assert unlearned == pytest.approx(probability(wrapped, examples), rel=1e-4)
    assert abs(unlearned / named(lines, "scale", point=0.0)["probability"]["value"] - 1) > 0.05


def test_base_files_are_untouched_and_no_text_is_stored(everything):
    _, _, folder, (weights, before) = everything
    assert artifacts.sha256(weights) == before
    for path in folder.rglob("*"):
        if path.is_file():
            assert SECRET not in path.read_text(encoding="utf-8")


def test_an_interrupted_command_resumes_and_gives_the_same(run, tmp_path, monkeypatch):
    _, expected = attack(run, tmp_path / "whole", attacks="prefix,sample,quantise,relearn")
    real, calls = dict(ATTACKS), []

    def counted(name, stop=False):
        def function(victim):
            calls.append(name)
            if stop:
                raise KeyboardInterrupt
            return real[name].run(victim)

        return replace(real[name], run=function)

    for name in ("none", "prefix", "sample"):
        monkeypatch.setitem(ATTACKS, name, counted(name))
    monkeypatch.setitem(ATTACKS, "quantise", counted("quantise", stop=True))
    with pytest.raises(KeyboardInterrupt):
        attack(run, tmp_path, attacks="prefix,sample,quantise,relearn")
    monkeypatch.setitem(ATTACKS, "quantise", real["quantise"])
    with pytest.raises(UsageError, match="--resume"):
        attack(run, tmp_path, attacks="prefix,sample,quantise,relearn")
    with pytest.raises(UsageError, match="relearn_lr"):
        attack(run, tmp_path, attacks="prefix,sample,quantise,relearn", relearn_lr=0.5, resume=True)
    about, lines = attack(run, tmp_path, attacks="prefix,sample,quantise,relearn", resume=True)
    assert lines == expected and calls == ["none", "prefix", "sample", "quantise"]
    assert about["seconds"].keys() == {f"unlearned {x['attack']}" for x in lines}


def test_relearning_with_a_lora_adapter(run, tmp_path):
    about, lines = attack(run, tmp_path, attacks="relearn", relearn_rank=2, relearn_lr=5e-2)
    values = [x["scores"]["probability"]["value"] for x in lines]
    assert values[-1] > 1.2 * values[0] and about["settings"]["relearn_rank"] == 2


@pytest.mark.parametrize(
    ("given", "dtype"),
    [({}, "float32"), ({"dtype": "auto"}, "float32"), ({"dtype": "bfloat16"}, "bfloat16"), ({"relearn_rank": 2}, None)],
)
def test_relearning_of_all_weights_is_in_float32_whatever_the_run_was_in(run, tmp_path, given, dtype):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    config = read_yaml(copied / "config.yaml") | {"dtype": "bfloat16"}
    write_yaml(copied / "config.yaml", config)
    [victim] = attacking._Bench.of(copied, options(**given)).victims
    held = {p.dtype for p in victim.load_trainable().parameters() if p.requires_grad == (dtype is not None)}
    assert held == {getattr(torch, dtype or "bfloat16")}
    assert victim.plain.model.dtype == (torch.float32 if given.get("dtype") == "auto" else torch.bfloat16)


def test_an_attack_that_fails_is_not_run_and_never_passes_in_silence(run, tmp_path, monkeypatch):
    def fails(victim):
        raise NumericError("train: the learn loss is nan at step 1.")

    monkeypatch.setitem(ATTACKS, "quantise", Attack("", None, fails))
    about, _ = attack(run, tmp_path, attacks=PLAIN, gate="probability<=1,quantise:probability<=1")
    assert about["not_run"] == [
        {"attack": "quantise", "subject": "unlearned", "reason": "train: the learn loss is nan at step 1"}
    ]
    every, one = about["gate"]
    assert every["passed"] and "NOT CHECKED, as they did not run: quantise" in every["text"] and not one["passed"]
    monkeypatch.setitem(ATTACKS, "none", Attack("", None, fails))
    with pytest.raises(NumericError):
        attack(run, tmp_path / "other", attacks=PLAIN)


def flags(tmp_path, *more):
    given = {"rows": 4, "generate-rows": 0, "attacks": PLAIN, "out": tmp_path / "attacks"}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))] + list(more)


def test_the_command_prints_a_table_and_the_gate_decides_the_exit_code(run, tmp_path, capfd):
    gate = ("--gate", "probability<=1,extraction_strength<=1")
    assert cli.main(["attack", str(run), *flags(tmp_path, *gate)]) == 0
    said = capfd.readouterr().out
    assert "quantise 4" in said and "gate probability<=1: passed" in said and "No retrained model was given" in said
    low = ("--gate", "probability<=0", "--json", "--overwrite")
    assert cli.main(["attack", str(run), *flags(tmp_path, *low)]) == attacking.GATE_FAILED == 20
    out, err = capfd.readouterr()
    assert "gate probability<=0: FAILED, worst" in err
    found = json.loads(out)
    assert found["unlearned_quantise_4_probability"]["n"] == 4 and "unlearned_none_exact_memorisation" in found


def test_the_default_folder_is_beside_the_run(run, tmp_path):
    attacking.attack(run, options(attacks="none", generate_rows=0))
    assert artifacts.differences(run.with_name("run-attacks")) == []
    shutil.rmtree(run.with_name("run-attacks"))


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--attacks", "prefx"], 2, "Did you mean 'prefix'"),
        (["--gate", "probability"], 2, "--gate must be SCORE<=VALUE"),
        (["--gate", "relearn:probability<=1"], 2, "Unknown attack in --gate"),
        (["--rows", "1"], 2, "--rows must be at least 2"),
        (["--retrained", "/no/such/model"], 3, "/no/such/model"),
        (["--forget", "RETAIN"], 3, "not the rows that"),
        (["--model", "RETRAINED"], 3, "not the weights that"),
        (["--retrained", "OTHER"], 3, "its tokenizer or chat template is another one"),
    ],
)
def test_mistakes_are_one_line(run, retrained, tokenizer, tmp_path, capfd, more, code, said):
    other = tmp_path / "other"
    tiny_llama(vocab_size=258).save_pretrained(other)
    longer = type(tokenizer).from_pretrained(retrained)
    longer.add_tokens(["<|more|>"])
    longer.save_pretrained(other)
    places = {"RETAIN": read_yaml(run / "config.yaml")["retain"], "RETRAINED": retrained, "OTHER": other}
    given = [str(places.get(word, word)) for word in more]
    capfd.readouterr()
    assert cli.main(["attack", str(run), *flags(tmp_path, *given)]) == code
    out, err = capfd.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1 and said in err and not (tmp_path / "attacks").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "[1]"),
        ("config.yaml", "rank: [1]"),
        ("data.json", "[]"),
        ("data.json", '{"forget": 3, "retain": 4}'),
        ("summary.json", "[]"),
        ("summary.json", '{"base": 3}'),
    ],
)
def test_a_run_whose_accounts_are_another_program_s(run, tmp_path, capfd, name, content):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    (copied / name).write_text(content)
    artifacts.write_manifest(copied)
    assert cli.main(["attack", str(copied), *flags(tmp_path)]) == 3
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1 and name in err[0] and "not what this program writes there" in err[0]
    assert not (tmp_path / "attacks").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("attacks.jsonl", "[1]\n"), ("attacks.jsonl", "{\n"), ("attack.json", "{}"), ("attack.json", "3")],
)
def test_results_of_an_interrupted_attack_that_are_another_program_s(run, tmp_path, capfd, monkeypatch, name, content):
    arguments = ["attack", str(run), *flags(tmp_path, "--attacks", "prefix")]
    with monkeypatch.context() as patch:
        patch.setitem(
            ATTACKS, "prefix", replace(ATTACKS["prefix"], run=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        )
        assert cli.main(arguments) == 75
    (tmp_path / ".attacks.partial" / name).write_text(content)
    capfd.readouterr()
    assert cli.main([*arguments, "--resume"]) == 3
    assert "not what this program writes there" in capfd.readouterr().err.splitlines()[-1]


def test_a_folder_without_an_adapter_is_refused(retrained, tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        attack(retrained, tmp_path)
