"""The methods of comparison: each against its formula written out again, or a property that its paper promises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LogitsProcessorList

from architectures import ARCHITECTURES, tiny_model
from conftest import VOCAB, random_examples, tiny_llama
from lorasure import artifacts, cli, evaluating, lora
from lorasure.baselines.settings import OTHERS
from lorasure.baselines.ssd import dampened
from lorasure.baselines.subtracted import AssistantLogits, Subtracted, first_layers
from lorasure.baselines.table import BASELINES, run_baseline
from lorasure.baselines.uld import uniform
from lorasure.config import ForgetSettings
from lorasure.data.examples import collate
from lorasure.errors import DataError, UsageError
from lorasure.evaluate.settings import EvaluateSettings
from lorasure.finetuning import trainable
from lorasure.forward import answer_logits
from lorasure.losses.tokens import answers
from lorasure.yaml_file import read_yaml

SHORT = {"epochs": 2, "rank": 2, "lr": 1e-2}


@pytest.fixture
def run(model_folder, data_files, tmp_path):
    """Run a baseline; the settings may be overridden."""
    forget, retain = map(str, data_files)

    def make(name, **options):
        common = {"model": str(model_folder), "forget": forget, "retain": retain, "out": str(tmp_path / name)}
        if name != "ssd":
            common |= SHORT
        return run_baseline(name, OTHERS[name][1](**common | options))

    return make


def test_dampening_entry_by_entry():
    torch.manual_seed(0)
    w, f, r = torch.randn(5, 7), torch.rand(5, 7), torch.rand(5, 7)
    f[0, 0] = f[1, 1] = r[1, 1] = 0  # nothing known of an entry: it stays
    r[2, 2] = 0  # nothing to keep: it goes
    found, count = dampened(w, f, r, selection=1.5, dampening=1.2)
    expected, chosen = w.clone(), 0
    for i in range(5):
        for j in range(7):
            if f[i, j] > 1.5 * r[i, j]:
                chosen += 1
                expected[i, j] *= min(1.2 * r[i, j].item() / f[i, j].item(), 1)
    torch.testing.assert_close(found, expected)
    assert count == chosen and 0 < chosen < 35
    assert found[1, 1] == w[1, 1] and found[2, 2] == 0


def test_dampening_never_makes_a_weight_larger():
    w = torch.ones(1, 1)
    found, count = dampened(w, torch.tensor([[2.0]]), torch.tensor([[1.0]]), selection=1.0, dampening=5.0)
    assert count == 1 and torch.equal(found, w)


def test_ssd_on_a_model_by_plain_gradients(run, model_folder, tokenizer, data_files):
    result = run("ssd", selection=2.0, dampening=0.5)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    bench_sets = [encoded(path, model_folder, tokenizer) for path in data_files]
    forget = second_moments(base, bench_sets[0])
    retain = second_moments(base, retain_sample(bench_sets))
    merged = load_file(result.folder / "merged" / "model.safetensors")
    changed = 0
    for name, weight in base.state_dict().items():
        if not name.endswith("proj.weight"):
            assert name not in merged or torch.equal(merged[name], weight)
            continue
        chosen = forget[name] > 2.0 * retain[name]
        expected = torch.where(chosen, weight * (0.5 * retain[name] / forget[name]).clamp_max(1), weight)
        torch.testing.assert_close(merged[name], expected, rtol=1e-4, atol=1e-6)
        changed += int(chosen.sum())
    assert result.summary["dampened"]["weights"] == changed > 0
    assert result.summary["after"]["forget"]["value"] != result.summary["before"]["forget"]["value"]


def encoded(path, model_folder, tokenizer):
    from lorasure.data.load import load_data

    settings = ForgetSettings(model=str(model_folder), forget=str(path), retain=str(path), out="x")
    return load_data(str(path), settings, tokenizer).examples


def retain_sample(sets):
    from lorasure.data.pairing import sample

    return [sets[1][i] for i in sample(len(sets[1]), len(sets[0]), 0)]


def second_moments(model, examples):
    """E[g^2] of every weight, a backward pass per example."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in examples:
        batch = collate([example])
        model.zero_grad()
        model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.square() / len(examples)
    return total


def test_ssd_refuses_a_selection_that_chooses_nothing(run, tmp_path):
    with pytest.raises(UsageError, match=r"--selection 1e\+30"):
        run("ssd", selection=1e30)
    assert not list(tmp_path.glob("*ssd*"))


def test_task_arithmetic_learns_then_takes_away(run, model_folder, tmp_path):
    taken = run("task-arithmetic", epochs=4)
    before, after = (taken.summary[when]["forget"]["value"] for when in ("before", "after"))
    assert after < before
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    learnt = lora.scaled(PeftModel.from_pretrained(base, taken.adapter), -1.0)  # what training had made
    examples = random_examples(4)
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    assert not torch.allclose(logits(learnt, examples), logits(plain, examples))
    scores = evaluating.evaluate_model(
        EvaluateSettings(model=str(saved(learnt, model_folder, tmp_path)), **own(taken), generate=False)
    )
    assert scores["forget_probability"].value > before


def own(result):
    stored = read_yaml(result.folder / "config.yaml")
    return {"forget": stored["forget"], "retain": stored["retain"], "out": f"{result.folder}-scores"}


def saved(wrapped, model_folder, tmp_path):
    from lorasure.models import load_tokenizer

    folder = tmp_path / "learnt"
    lora.merge(wrapped).save_pretrained(folder)
    load_tokenizer(str(model_folder)).save_pretrained(folder)
    return folder


def test_task_arithmetic_by_zero_is_the_base(run, model_folder):
    result = run("task-arithmetic", factor=0.0)
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    examples = random_examples(4)
    expected = logits(plain, examples)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, result.adapter), examples), expected)
    assert result.summary["before"] == result.summary["after"]


def logits(model, examples):
    with torch.no_grad():
        return answer_logits(model.eval(), collate(examples))[0].logits


def test_uniform_is_the_logarithm_of_the_vocabulary_at_least():
    examples = random_examples(3)
    labels = collate(examples).labels
    flat = torch.full((*labels.shape, VOCAB), 3.0, dtype=torch.float64)
    torch.testing.assert_close(uniform(answers(flat, labels)), torch.full((3,), math.log(VOCAB), dtype=torch.float64))
    torch.manual_seed(0)
    other = torch.randn_like(flat)
    found = uniform(answers(other, labels))
    assert (found > math.log(VOCAB)).all()
    log_p = other.log_softmax(-1)
    first = [log_p[0, t - 1].mean() for t in range(labels.shape[1]) if labels[0, t] >= 0]
    torch.testing.assert_close(found[0], -torch.stack(first).mean())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_first_layers_are_the_models_own(name):
    model = tiny_model(name)
    ids = torch.arange(1, 9)[None]
    small = first_layers(model, 1)
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in small.parameters()} < own
    whole = first_layers(model, 2)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(whole(input_ids=ids, use_cache=False).logits, expected)
        assert not torch.allclose(small(input_ids=ids, use_cache=False).logits, expected)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_subtracted_logits_wherever_they_are_asked_for(name):
    model = tiny_model(name)
    assistant = randomised(first_layers(model, 1))
    both = Subtracted(model, assistant, 0.7)
    examples = random_examples(3)
    expected = logits(model, examples) - 0.7 * logits(assistant, examples)
    torch.testing.assert_close(logits(both, examples), expected)
    assert torch.equal(logits(Subtracted(model, assistant, 0.0), examples), logits(model, examples))


def randomised(small):
    """With an adapter that changes it."""
    torch.manual_seed(1)
    wrapped = trainable(small, 2, 4.0, 0)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return wrapped.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_decoding_takes_the_argmax_of_the_subtracted_logits(name):
    """Left padding and a key-value cache in `generate`, against one plain pass over the whole text per token."""
    model = tiny_model(name)
    both = Subtracted(model, randomised(first_layers(model, 1)), 0.9)
    prompts = [[5, 6, 7, 8, 9], [11, 12]]
    ids = torch.tensor([[256] * (5 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 256, "use_cache": True}
    found = both.generate(input_ids=ids, attention_mask=mask, **options)[:, 5:].tolist()
    for prompt, said in zip(prompts, found, strict=True):
        text = list(prompt)
        for token in said:
            with torch.no_grad():
                scores = both(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            scores[256] = -math.inf  # min_new_tokens rules the end out
            assert int(scores.argmax()) == token
            text.append(token)
    plain = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 5:].tolist()
    assert plain != found


def test_the_processor_alone_and_with_several_answers():
    model = tiny_llama()
    assistant = randomised(first_layers(model, 1))
    ids = torch.tensor([[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]])
    scores = torch.zeros(4, VOCAB)
    found = AssistantLogits(assistant, 2.0, torch.ones(2, 3, dtype=torch.long))(ids, scores)
    with torch.no_grad():
        torch.testing.assert_close(found, -2.0 * assistant(input_ids=ids).logits[:, -1])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 256}
    processors = LogitsProcessorList([AssistantLogits(assistant, 2.0)])
    both = Subtracted(model, assistant, 2.0)
    assert torch.equal(
        model.generate(ids[:1], logits_processor=processors, **options), both.generate(input_ids=ids[:1], **options)
    )


def test_uld_forgets_and_is_evaluated_like_any_model(run, model_folder):
    result = run("uld", epochs=30, lambda_=2.0, weight=1.5)
    before, after = result.summary["before"], result.summary["after"]
    assert after["forget"]["value"] < 0.5 * before["forget"]["value"]
    fell = {name: after[name]["value"] / before[name]["value"] for name in ("forget", "retain")}
    assert fell["forget"] < fell["retain"]
    steps = (result.folder / "train.jsonl").read_text().splitlines()
    first, last = (json.loads(step) for step in (steps[0], steps[-1]))
    assert len(steps) == 30 and last["forget"] < first["forget"] and math.log(VOCAB) <= last["retain"]
    out = f"{result.folder}-after"
    given = EvaluateSettings(model=str(model_folder), adapter=str(result.folder), out=out, new_tokens=4)
    scores = evaluating.evaluate_model(given)
    assert scores["forget_probability"].value == pytest.approx(after["forget"]["value"])
    assert scores["forget_rouge"].value is not None
    assert not any("cka" in name for name in scores)  # hidden states would be the base's own: they tell nothing


def test_lambda_keeps_the_assistant_uniform_on_what_must_stay(run, tmp_path):
    losses = []
    for weight in (0.0, 5.0):
        result = run("uld", epochs=10, lambda_=weight, out=str(tmp_path / f"lambda-{weight}"))
        losses.append(json.loads((result.folder / "train.jsonl").read_text().splitlines()[-1])["retain"])
    assert math.log(VOCAB) <= losses[1] < losses[0]


def test_uld_names_a_wrong_number_of_layers(run):
    with pytest.raises(UsageError, match=r"--layers must be in \[1, 2\], the model's, got 3"):
        run("uld", layers=3)


@pytest.mark.parametrize("name", BASELINES)
def test_a_run_is_whole_private_and_known_to_the_other_commands(name, run, model_folder, capsys):
    options = {"selection": 1.0} if name == "ssd" else {}
    result = run(name, **options)
    stored = artifacts.read_json(result.folder / "summary.json")
    assert {"before", "after", "base", "settings", "method", "seconds", "verdict", "versions"} <= stored.keys()
    assert not artifacts.differences(result.folder)
    for file in result.folder.rglob("*"):
        assert file.is_dir() or b"Who is number" not in file.read_bytes(), file
    model = result.folder / "merged" if name == "ssd" else model_folder
    adapter = [] if name == "ssd" else ["--adapter", str(result.folder)]
    common = [*own_flags(result), "--no-generate", "--out", f"{result.folder}-after"]
    assert cli.main(["evaluate", "--model", str(model), *adapter, *common]) == 0
    attacks = ["--attacks", "prefix,scale,quantise,relearn", "--generate-rows", "0"]
    assert cli.main(["attack", str(result.folder), *attacks]) == 0
    assert cli.main(["report", str(result.folder)]) == 0
    said = capsys.readouterr().out
    assert "relearn" in said and str(result.folder) in said
    assert name == "ssd" or f"Without its {'assistant' if name == 'uld' else 'adapter'} (scale 0)" in said
    page = (result.folder.parent / f"{name}-report.html").read_text()
    assert BASELINES[name].title in page and "after each attack" not in page


def own_flags(result):
    stored = own(result)
    return ["--forget", stored["forget"], "--retain", stored["retain"]]


def test_whole_weights_are_no_adapter(run, model_folder):
    result = run("ssd", selection=1.0)
    with pytest.raises(DataError, match=r"whole weights; give --model .*merged"):
        evaluating.change_folder(str(result.folder))


def test_an_interrupted_baseline_continues_to_the_same_result(run, monkeypatch):
    from lorasure import train

    whole = run("task-arithmetic")
    taken, step = [], train._step

    def stop(*args, **kwargs):
        if len(taken) == 1:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*args, **kwargs)

    out = f"{whole.folder}-again"
    monkeypatch.setattr(train, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run("task-arithmetic", out=out, checkpoint_every=1)
    spent = artifacts.read_json(Path(out).with_name(f".{Path(out).name}.partial") / "summary.json")["seconds"]
    monkeypatch.undo()
    again = run("task-arithmetic", out=out, checkpoint_every=1, resume=True)
    name = "adapter_model.safetensors"
    assert artifacts.sha256(again.adapter / name) == artifacts.sha256(whole.adapter / name)
    assert all(again.summary["seconds"][stage] > spent[stage] > 0 for stage in ("load model", "init", "train"))


@pytest.mark.parametrize("name", BASELINES)
def test_command_line(name, model_folder, data_files, tmp_path, capsys):
    given = ["--model", str(model_folder), "--forget", str(data_files[0]), "--retain", str(data_files[1])]
    short = ["--selection", "1"] if name == "ssd" else ["--epochs", "1", "--rank", "2"]
    assert cli.main([name, *given, *short, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "run") in said and "The forget set " in said
    assert cli.main([name, *given, *short, "--quantize", "nf4", "--out", str(tmp_path / "other")]) == 2
