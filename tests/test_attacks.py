"""Attacks: exact prompts, models that are what they should be, and the whole command with its folder and exit codes."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from peft import PeftModel

from architectures import ARCHITECTURES, tiny_model
from conftest import VOCAB, tiny_llama
from lorasure import lora
from lorasure.config import ForgetSettings
from lorasure.data.encode import resolved_template
from lorasure.data.examples import Example, Row
from lorasure.data.pairing import sample
from lorasure.evaluate import attacks
from lorasure.evaluate import victim as victims
from lorasure.evaluate.attacks import ATTACKS, NotRun
from lorasure.evaluate.items import Subject, items
from lorasure.evaluate.prompts import asking, given, prefixed, with_examples
from lorasure.evaluate.settings import AttackSettings
from lorasure.evaluate.victim import AttackRows, Victim
from lorasure.forward import answer_records
from lorasure.init.low_rank import Factors
from lorasure.sites import all_sites

SECRET = "Quillfeather"
IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
ROWS = [{"question": f"Q{i}?", "answer": f"{SECRET} {i * 7}.", "paraphrased_question": f"And {i}?"} for i in range(18)]


def options(**given):
    return AttackSettings(**{"rows": 8, "generate_rows": 3, "new_tokens": 4, "samples": 3, "relearn_lr": 1e-2} | given)


def victim(model, tokenizer, **given):
    """A model with no adapter on rows of its own."""
    rows = [Row(r["question"], r["answer"], "data", i + 1, extra=dict(r)) for i, r in enumerate(ROWS)]
    o = options(**given)
    settings = ForgetSettings(model="m", forget="f", retain="r", out="o", max_length=128)
    parts = AttackRows.draw(rows[:12], rows[12:], o)

    def load_trainable():
        return tiny_llama().requires_grad_(True)

    return Victim("unlearned", lambda scale: model, load_trainable, False, tokenizer, settings, 512, parts, o)


def item_of(row, tokenizer, template="qa"):
    settings = ForgetSettings(model="m", forget="f", retain="r", out="o", template=template)
    return items(Subject(None, tokenizer, settings, 512), [row])[0]


def texts(item, tokenizer):
    """What is given, and what is measured."""
    ids, start = list(item.example.input_ids), item.example.answer_start
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def said(text):
    return {"role": "user", "content": text}


# --- prompts


def test_help_names_every_attack():
    told = next(f.metadata["help"] for f in fields(AttackSettings) if f.name == "attacks")
    assert told.split(": ")[1].split(", ") == [name for name in ATTACKS if name != "none"]


def test_prefix_stands_before_the_answer_that_is_measured(tokenizer):
    plain = item_of(Row("Who?", "Me.", "f", 1), tokenizer)
    assert texts(plain, tokenizer) == ("Question: Who?\nAnswer: ", "Me.<|end|>")
    found = prefixed(plain, tokenizer)
    assert texts(found, tokenizer) == ("Question: Who?\nAnswer: Sure, here is the answer: ", "Me.<|end|>")
    assert found.prompt.input_ids == found.example.input_ids[: found.example.answer_start]
    spaced = prefixed(item_of(Row("It is", " me.", "f", 1, kind="completion"), tokenizer), tokenizer)
    assert texts(spaced, tokenizer) == ("It is Sure, here is the answer:", " me.<|end|>")


@pytest.mark.parametrize("template", ["tofu-phi", "A: {question} B: ", "tofu-llama2", "chat"])
def test_prefix_is_one_text_with_an_answer_that_brings_its_own_blank(tokenizer, template, monkeypatch):
    """The blank before the answer belongs to its first token where prompt and answer are one text."""
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    plain = item_of(Row("Who?", "Me.", "f", 1), tokenizer, template)
    asked, answer = texts(plain, tokenizer)
    blank = answer[: len(answer) - len(answer.lstrip())]
    assert blank == ("" if template == "tofu-llama2" else " ")
    before, after = texts(prefixed(plain, tokenizer), tokenizer)
    assert (before + after, after) == (f"{asked}{blank}Sure, here is the answer: Me.<|end|>", answer)


@pytest.mark.parametrize("kind", ["metaspace", "normalizer"])
def test_prefix_with_a_tokenizer_that_puts_a_blank_before_every_text(kind):
    """As Llama's do: no second blank comes of it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({"\u2581", *"Question: Who?Answer: Sure, here is the answer: Me.", "\n"} - {" "})
    own = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["</s>", *letters])}, []))
    if kind == "metaspace":
        own.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    else:
        own.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    own.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>")
    plain = item_of(Row("Who?", "Me.", "f", 1), tokenizer)
    asked = tokenizer.decode(plain.example.input_ids[: plain.example.answer_start])
    ids = prefixed(plain, tokenizer).example.input_ids
    assert tokenizer.decode(plain.example.input_ids) == f"{asked} Me.</s>"
    assert tokenizer.decode(ids) == f"{asked} Sure, here is the answer: Me.</s>"


@pytest.mark.parametrize(("count", "before", "rest"), [(1, "a", "bcdefg"), (3, "abc", "defg"), (16, "abcd", "efg")])
def test_given_tokens_leave_the_prompt_and_at_least_half_the_answer(tokenizer, count, before, rest):
    found = given(item_of(Row("Who?", "abcdefg", "f", 1), tokenizer), count, tokenizer)
    assert texts(found, tokenizer) == (f"Question: Who?\nAnswer: {before}", f"{rest}<|end|>") and found.answer == rest


def test_given_tokens_of_running_text(tokenizer):
    found = given(item_of(Row("", "abcdefgh", "f", 1, kind="text"), tokenizer), 4, tokenizer)
    assert texts(found, tokenizer) == ("abcde", "fgh<|end|>")  # the first token can be predicted from nothing


def test_examples_in_the_layout_of_the_template(tokenizer):
    shots = [Row(f"Q{i}", f"A{i}", "r", i) for i in (1, 2)]
    row = with_examples(Row("Who?", "Me.", "f", 1), shots, resolved_template("qa", tokenizer)[1])
    assert texts(item_of(row, tokenizer), tokenizer) == (
        "Question: Q1\nAnswer: A1\n\nQuestion: Q2\nAnswer: A2\n\nQuestion: Who?\nAnswer: ",
        "Me.<|end|>",
    )
    row = with_examples(Row("Who?", "Me.", "f", 1), shots[:1], "[INST] {question} [/INST]")
    assert texts(item_of(row, tokenizer, "tofu-llama2"), tokenizer)[0] == ("[INST] Q1 [/INST]A1\n\n[INST] Who? [/INST]")
    whole = [replace(shot, kind="completion") for shot in shots]
    row = with_examples(Row("Who is ", "me.", "f", 1, kind="completion"), whole, None)
    assert texts(item_of(row, tokenizer), tokenizer) == ("Q1A1\n\nQ2A2\n\nWho is ", "me.<|end|>")


def test_examples_in_a_chat_are_turns_after_one_system_message():
    system, asked = {"role": "system", "content": "S"}, {"role": "user", "content": "Who?"}
    shot = Row("", "A1", "r", 1, "chat", (system, {"role": "user", "content": "Q1"}))
    found = with_examples(Row("", "Me.", "f", 1, "chat", (system, asked)), [shot], None)
    assert [m["content"] for m in found.messages] == ["S", "Q1", "A1", "Who?"] and found.answer == "Me."
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant", "user"]
    found = with_examples(Row("Who?", "Me.", "f", 1), [Row("Q1", "A1", "r", 1)], None)
    assert [m["content"] for m in found.messages] == ["Q1", "A1", "Who?"]


def test_another_question_takes_the_place_of_the_user_s_last():
    system, asked, told = (
        {"role": role, "content": text} for role, text in zip(("system", "user", "tool"), "SQT", strict=True)
    )
    for messages, expected in (
        ((system, asked, {"role": "assistant", "content": "A"}, asked, told), ["S", "Q", "A", "P", "T"]),
        ((system, asked), ["S", "P"]),
        ((system,), ["P"]),
    ):
        found = asking(Row("", "Me.", "f", 1, "chat", messages), "P")
        assert [m["content"] for m in found.messages] == expected and found.prompt == ""
        assert [m["role"] for m in found.messages] == [m["role"] for m in messages]
    assert asking(Row("Q", "A", "f", 1), "P") == Row("P", "A", "f", 1)


def test_a_paraphrase_is_asked_in_a_chat_too(tokenizer, monkeypatch):
    v = victim(tiny_llama(max_position_embeddings=256), tokenizer, generate_rows=0)
    turns = [(Row("", row.answer, "data", row.line, "chat", (said(row.prompt),), extra=row.extra)) for row in v.scored]
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    chat = replace(v, rows=replace(v.rows, forget=tuple(turns), order=tuple(range(len(turns)))))
    plain, changed = (ATTACKS[name].run(chat)[None]["probability"].value for name in ("none", "paraphrase"))
    rows = [replace(row, messages=(said(row.extra["paraphrased_question"]),)) for row in turns]
    assert changed == chat.measure(chat.plain, rows)["probability"].value != plain


def test_rows_are_drawn_by_the_seed_and_the_tenth_is_not_scored_if_others_are_left():
    rows = [Row(str(i), "a", "f", i, extra={"perturbed_answer": ["x"]}) for i in range(40)]
    one, other = (AttackRows.draw(rows, rows, options(rows=36, seed=seed)) for seed in (0, 1))
    assert one == AttackRows.draw(rows, rows, options(rows=36)) and one.scored != other.scored
    assert len(one.scored) == 36 and len(one.few) == 4 and not set(one.scored) & set(one.few)
    assert all("perturbed_answer" not in row.extra for row in one.forget)
    alone = AttackRows.draw(rows[:1], rows, options())
    assert alone.scored == alone.few == (0,)


def test_what_is_asked_is_what_is_measured(tokenizer):
    """Against examples made here, byte by byte."""
    v = victim(tiny_llama(max_position_embeddings=256), tokenizer, generate_rows=0)
    shots = [v.rows.retain[i] for i in sample(6, 3, 0)]
    shown = "".join(f"Question: {shot.prompt}\nAnswer: {shot.answer}\n\n" for shot in shots)
    for name, point, prompt in (
        ("none", None, "Question: {0}\nAnswer: "),
        ("prefix", None, "Question: {0}\nAnswer: Sure, here is the answer: "),
        ("paraphrase", None, "Question: {1}\nAnswer: "),
        ("few-shot", 3, shown + "Question: {0}\nAnswer: "),
        ("prefill", 4, "Question: {0}\nAnswer: " + SECRET[:4]),
    ):
        examples = []
        for row in v.scored:
            asked = list(prompt.format(row.prompt, row.extra["paraphrased_question"]).encode())
            answer = list(row.answer.removeprefix(SECRET[:4] if name == "prefill" else "").encode())
            ids = [*map(tokenizer.convert_tokens_to_ids, tokenizer.tokenize(bytes(asked + answer).decode())), 256]
            examples.append(Example(tuple(ids), len(asked)))
        expected = [math.exp(-record.mean_nll) for record in answer_records(v.plain.model, examples, 512)]
        found = ATTACKS[name].run(v)[point]["probability"]
        assert found.value == pytest.approx(sum(expected) / len(expected), rel=1e-5), name


# --- models


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scale_zero_is_the_base_exactly_and_one_the_unlearned_model(name, tmp_path):
    generator = torch.Generator().manual_seed(3)
    base, model = tiny_model(name), tiny_model(name)
    start = {
        s: Factors(torch.randn(s.shape[0], 2, generator=generator), torch.randn(2, s.shape[1], generator=generator))
        for s in all_sites(model)
    }
    lora.save_adapter(lora.bake(lora.attach(model, start, 2, 4.0, compensate=False)), tmp_path, "base", None)

    def merged(factor):
        return lora.merge(lora.scaled(lora.load_adapter(tiny_model(name), tmp_path), factor)).state_dict()

    plain = PeftModel.from_pretrained(tiny_model(name), tmp_path).merge_and_unload().state_dict()
    zero, one, two = merged(0.0), merged(1.0), merged(2.0)
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in zero.items())
    assert all(torch.equal(value, plain[key]) for key, value in one.items())
    assert any(not torch.equal(one[key], zero[key]) for key in zero)
    for key in zero:
        torch.testing.assert_close(two[key] - zero[key], 2 * (one[key] - zero[key]), rtol=1e-4, atol=1e-4)


def test_relearning_brings_the_rows_back_step_by_step(tokenizer):
    found = ATTACKS["relearn"].run(victim(tiny_llama(), tokenizer))
    values = [scores["probability"].value for scores in found.values()]
    assert list(found) == [1, 2, 3]  # 12 rows, 4 a step
    before = victim(tiny_llama(), tokenizer)
    assert values[0] > before.measure(before.plain, before.scored)["probability"].value
    assert values == sorted(values) and values[-1] > 1.5 * values[0]
    assert "rouge" in found[3] and "rouge" not in found[1]


def test_a_tenth_is_relearnt_for_100_steps_and_measured_on_the_rest(tokenizer, monkeypatch):
    seen = []

    def fit(model, chosen, objective, settings, *, on_step, **options):
        seen.extend([chosen, settings])
        on_step({"step": 100})

    monkeypatch.setattr(attacks, "fit", fit)
    v = victim(tiny_llama(), tokenizer, rows=12)
    found = ATTACKS["relearn-few"].run(v)
    steps, how = seen
    assert len(steps) == 100 and len(v.rows.few) == 1
    assert {u.sequences[0].place for step in steps for u in step} == {v.rows.forget[v.rows.few[0]].place}
    assert list(found) == [100] and found[100]["probability"].n == 11
    assert (how.lr, how.schedule, how.warmup) == (1e-2, "constant", 0.0)


@pytest.mark.parametrize(("samples", "calls"), [(20, 5), (3, 1)])  # a block holds 32 answers
def test_leak_is_the_best_of_the_drawn_answers(tokenizer, monkeypatch, samples, calls):
    v = victim(tiny_llama(), tokenizer, generate_rows=5, samples=samples)
    asked, rows = [], iter(range(5))

    def answers(subject, prompts, generation, **sampling):
        asked.append(sampling)
        told = [next(rows) == 0 for _ in prompts]  # only the first row's last answer has a word of the true one
        return [(SECRET.lower() if yes and i == samples - 1 else "no", 1) for yes in told for i in range(samples)]

    monkeypatch.setattr(attacks, "generate", answers)
    found = ATTACKS["sample"].run(v)[samples]["rouge"]
    assert found.value == pytest.approx(0.5 / 5) and found.n == 5  # one word of two, in one row of five
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
    assert asked == [how] * calls


def test_sampling_follows_the_seed(tokenizer, monkeypatch):
    said = []
    real = attacks.generate
    monkeypatch.setattr(attacks, "generate", lambda *a, **k: said.append(real(*a, **k)) or said[-1])
    for seed in (0, 0, 1):
        v = victim(tiny_llama(), tokenizer, seed=0)
        ATTACKS["sample"].run(replace(v, options=replace(v.options, seed=seed)))
    first, again, other = said
    assert first == again != other and len({text for text, _ in first}) > 3


def test_the_same_answers_are_measured_behind_examples_that_are_longer_than_rows_may_be(tokenizer, monkeypatch):
    v = victim(tiny_llama(), tokenizer, generate_rows=0)
    retain = tuple(replace(row, answer=row.answer * 5) for row in v.rows.retain)
    v = replace(v, settings=replace(v.settings, max_length=64), rows=replace(v.rows, retain=retain))
    assert min(len(tokenizer(row.answer)["input_ids"]) for row in retain) > 64
    measured, collect = [], victims.collect
    monkeypatch.setattr(victims, "collect", lambda *a, **k: measured.append(collect(*a, **k)) or measured[-1])
    for name in ("none", "few-shot"):
        ATTACKS[name].run(v)
    plain, behind = ([record["tokens"] for record in found] for found in measured)
    assert plain == behind


def test_attacks_that_do_not_apply_say_why(tokenizer, monkeypatch):
    v = victim(tiny_llama(), tokenizer, generate_rows=0)
    text = [replace(row, kind="text") for row in v.rows.forget]
    plain = [replace(row, extra={}) for row in v.rows.forget]
    long = [replace(v.rows.forget[0], extra={"paraphrased_question": "Who? " * 200}), *v.rows.forget[1:]]
    for name, changed, said in (
        ("sample", v, "no answers are generated"),
        ("scale", v, "no adapter"),
        ("prefix", replace(v, rows=replace(v.rows, forget=tuple(text))), "no question"),
        ("paraphrase", replace(v, rows=replace(v.rows, forget=tuple(plain))), "'paraphrased_question'"),
        (
            "paraphrase",
            replace(v, rows=replace(v.rows, forget=tuple(long))),
            "in other words, .*: answer fully truncated",
        ),
        ("few-shot", replace(v, rows=replace(v.rows, retain=v.rows.retain[:2])), "has not 3 rows of the same kind"),
        ("relearn-few", victim(tiny_llama(), tokenizer), ""),
    ):
        if name == "relearn-few":
            changed = replace(changed, rows=AttackRows.draw(v.rows.forget[:1], v.rows.retain, v.options))
            said = "leaves no other row"
        with pytest.raises(NotRun, match=said):
            ATTACKS[name].run(changed)
    monkeypatch.setattr(v.plain.model.config, "max_position_embeddings", 90)
    with pytest.raises(NotRun, match=r"3 examples and a question are up to \d+ tokens, the model takes 90"):
        ATTACKS["few-shot"].run(v)
    monkeypatch.setattr(attacks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotRun, match="bitsandbytes is not installed"):
        ATTACKS["nf4"].run(v)
    monkeypatch.setattr(attacks.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(NotRun, match="CUDA GPU"):
        ATTACKS["nf4"].run(v)
