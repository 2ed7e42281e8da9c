"""Encoding: what the prompt is, where the loss begins, what is cut, and that TOFU's own encoding is matched."""

import datetime
import json
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as chat_utils
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorasure.data.encode import REFUSALS, TEMPLATES, encode, refusal_rows
from lorasure.data.examples import Row
from lorasure.errors import DataError, UsageError

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CHAT = "<s>" + TURNS + PROMPT


def make_tokenizer(chat_template=None, front=("<s>",), back=(), merges=(), eos="</s>"):
    """One token per byte (and per merge), special tokens in front of and behind each text."""
    vocab = {
        t: i for i, t in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)])
    }
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    bpe.add_special_tokens(SPECIAL)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    around = [(t, vocab[t]) for t in {*front, *back}]
    bpe.post_processor = processors.TemplateProcessing(single=[*front, "$A", *back], special_tokens=around)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos)  # no padding token: none is needed
    tokenizer.chat_template = chat_template
    return tokenizer


PLAIN = make_tokenizer()


def qa(prompt="Who?", answer="Ada", line=1, **kwargs):
    return Row(prompt, answer, "f.jsonl", line, **kwargs)


def run(row, tokenizer=PLAIN, **kwargs):
    return encode([row], tokenizer, **{"max_length": 400, "stride": 100, **kwargs})


def halves(row, tokenizer=PLAIN, **kwargs):
    """Decoded prompt and answer of the one example."""
    (example,) = run(row, tokenizer, **kwargs).examples
    return tuple(
        tokenizer.decode(part)
        for part in (example.input_ids[: example.answer_start], example.input_ids[example.answer_start :])
    )


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        ("auto", "<s>Question: Who?\nAnswer: ", "Ada</s>"),
        ("qa", "<s>Question: Who?\nAnswer: ", "Ada</s>"),
        ("tofu-phi", "<s>Question: Who?\nAnswer:", " Ada</s>"),
        ("tofu-llama2", "<s>[INST] Who? [/INST]", "Ada</s>"),
        ("Q {x} {question}\n", "<s>Q {x} Who?\n", "Ada</s>"),
        ("{question} A: ", "<s>Who? A:", " Ada</s>"),
    ],
)
def test_templates(template, prompt, answer):
    assert halves(qa(), template=template) == (prompt, answer)


@pytest.mark.parametrize("template", ["tofu-phi", "tofu-llama2", "Q: {question} A: "])
def test_prompt_and_answer_are_tokenized_as_one_text(template):
    """What a model is asked and says is one text to TOFU's code, and to all that has learnt to read."""
    tokenizer = make_tokenizer(merges=[("Ġ", "A"), ("d", "a")])
    (example,) = run(qa(), tokenizer, template=template).examples
    text = TEMPLATES[template].text if template in TEMPLATES else template
    assert list(example.input_ids) == [*tokenizer(text.replace("{question}", "Who?") + "Ada")["input_ids"], 1]


def test_every_template_has_a_title_and_a_place_for_the_question():
    for template in TEMPLATES.values():
        assert template.title
        assert template.text is None or template.text.count("{question}") == 1


def test_braces_in_text_survive():
    assert halves(qa("{0} {answer} {question}", "{x}"), template="{question}:") == (
        "<s>{0} {answer} {question}:",
        "{x}</s>",
    )


def test_end_of_text_inside_a_text_is_kept():
    (example,) = run(qa(answer="a</s>b")).examples
    assert example.input_ids[example.answer_start :].count(PLAIN.eos_token_id) == 2


def test_a_tokenizer_that_adds_an_end_does_not_end_the_prompt():
    tokenizer = make_tokenizer(back=("</s>",))
    assert halves(qa(), tokenizer) == ("<s>Question: Who?\nAnswer: ", "Ada</s>")
    assert halves(qa("P", "C", kind="completion"), tokenizer) == ("<s>P", "C</s>")
    assert run(qa("", "abc", kind="text"), tokenizer).examples[0].input_ids.count(1) == 1


def test_unknown_template():
    with pytest.raises(
        UsageError, match=r"Unknown template .*\{question\}.* 'qq'. Did you mean 'qa'\? Choose one of: auto"
    ):
        run(qa(), template="qq")
    with pytest.raises(UsageError, match=r"^Unknown template .*$"):
        run(qa(), template="two\nlines")
    with pytest.raises(UsageError, match=r"no chat template. Choose another template: qa, tofu-phi, tofu-llama2"):
        run(qa(), template="chat")


def test_no_end_of_text():
    with pytest.raises(DataError, match=r"no end-of-text token"):
        run(qa(), make_tokenizer(eos=None))


def test_auto_takes_the_chat_template():
    tokenizer = make_tokenizer(CHAT)
    assert halves(qa(), tokenizer) == ("<s><|user|>Who?<|end|>\n<|assistant|>", "Ada<|end|>")
    assert run(qa(), tokenizer).template == "chat"
    assert halves(qa(), tokenizer, template="qa") == ("<s>Question: Who?\nAnswer: ", "Ada</s>")


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        # blanks before the answer are the answer's; text there is the prompt's; nothing after the answer means eos
        (CHAT.replace("{{ m.content }}", " {{ m.content }}"), "<s><|user|> Who?<|end|>\n<|assistant|>", " Ada<|end|>"),
        (
            TURNS.replace("{{ m.c", "{% if m.role == 'assistant' %}<think>\n</think>\n{% endif %}{{ m.c") + PROMPT,
            "<|user|>Who?<|end|>\n<|assistant|><think>\n</think>\n",
            "Ada<|end|>",
        ),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "Who?\n", "Ada</s>"),
    ],
)
def test_what_stands_around_the_answer(template, prompt, answer):
    assert halves(qa(), make_tokenizer(template)) == (prompt, answer)


def test_messages():
    messages = ({"role": "system", "content": "S"}, {"role": "user", "content": "U"})
    row = qa("", "A", kind="chat", messages=messages)
    expected = ("<s><|system|>S<|end|>\n<|user|>U<|end|>\n<|assistant|>", "A<|end|>")
    assert halves(row, make_tokenizer(CHAT)) == expected
    assert halves(row, make_tokenizer(CHAT), template="qa") == expected  # a conversation has no other template
    with pytest.raises(DataError, match=r"f.jsonl:1: a row of messages needs a tokenizer with a chat template"):
        run(row)


def test_the_date_is_pinned(monkeypatch):
    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_utils, "datetime", Tomorrow)
    given = "{% if date_string is defined %}{{ date_string }}{% endif %}"
    inner = "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ today() }}"  # as in gpt-oss
    for date in (given, inner, "  {% set day = strftime_now('%d %b %Y') %}\n{{ day }}"):
        tokenizer = make_tokenizer(date + CHAT)
        assert halves(qa(), tokenizer)[0].startswith("26 Jul 2024<s>")
    tokenizer = make_tokenizer("{{ strftime_now('%A %Y-%m-%d %H:%M') }}" + CHAT)
    assert halves(qa(), tokenizer)[0].startswith("Friday 2024-07-26 00:00<s>")
    unpinned = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], chat_template="{{ strftime_now('%Y') }}", tokenize=False
    )
    assert unpinned == "2031"  # so the test above can fail


def test_chat_templates_that_refuse():
    refuse = make_tokenizer("{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(
        DataError, match=r"^f.jsonl:1: the tokenizer's chat template refuses .* \(roles must alternate\)"
    ):
        run(qa(), refuse)
    with pytest.raises(DataError, match=r"leaves out the assistant's answer"):
        run(qa(), make_tokenizer("{{ messages[0].content }}"))


def test_completion_is_joined_as_running_text():
    tokenizer = make_tokenizer(CHAT)
    assert halves(qa("P", " C", kind="completion"), tokenizer) == ("<s>P", " C</s>")
    assert halves(qa("", "C", kind="completion"), tokenizer) == ("<s>", "C</s>")


def test_a_merge_across_the_seam_does_not_change_the_prompt():
    tokenizer = make_tokenizer(merges=[("a", "b")])
    (example,) = run(qa("xa", "bc", kind="completion"), tokenizer).examples
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == ["<s>", "x", "a", "b", "c", "</s>"]
    assert example.answer_start == 3


def test_truncation_is_counted_and_its_end_named():
    encoded = encode([qa(answer="Ada"), qa(answer="A" * 50, line=2)], PLAIN, max_length=40, stride=1)
    assert encoded.truncated == ("f.jsonl:2",) and encoded.rows == (0, 1)
    assert [len(e) for e in encoded.examples] == [24 + 4, 40] and encoded.examples[1].answer_start == 24
    assert json.loads(json.dumps(encoded.counts())) == {
        "template": "qa",
        "rows": 2,
        "examples": 2,
        "truncated": 1,
        "tokens": 28 + 40,
        "answer_tokens": 4 + 16,
    }
    exact = encode([qa()], PLAIN, max_length=28, stride=1)
    assert exact.truncated == ()
    with pytest.raises(DataError, match=r"f.jsonl:1: answer fully truncated: prompt has 24 tokens, --max-length is 24"):
        run(qa(), max_length=24)
    assert run(qa(), max_length=25).examples[0].answer_length == 1


def test_text_of_which_no_token_is_made_is_refused():
    """Zero-width characters look like text, and a tokenizer may drop them."""
    tokenizer = make_tokenizer(front=())
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    for kind in ("text", "completion"):
        with pytest.raises(DataError, match=r"^f\.jsonl:3: the tokenizer makes no tokens of this row\."):
            run(qa("", "\u200b", line=3, kind=kind), tokenizer)
        assert run(qa("", "a\u200b", kind=kind), tokenizer).examples[0].answer_length == 1


def test_example_carries_place_and_group():
    (example,) = run(qa(group="g", line=5)).examples
    assert (example.place, example.group) == ("f.jsonl:5", "g")


@given(length=st.integers(1, 60), max_length=st.integers(2, 20), stride=st.integers(1, 19))
def test_windows_give_each_token_its_loss_once(length, max_length, stride):
    row = Row("", "".join(chr(97 + i % 26) for i in range(length)), "f.txt", 1, kind="text", group="g")
    if stride >= max_length:
        with pytest.raises(UsageError, match=r"--stride must be in \[1, "):
            run(row, max_length=max_length, stride=stride)
        return
    whole = (*PLAIN(row.answer)["input_ids"], PLAIN.eos_token_id)
    if (beyond := len(whole) - 1 - max_length) >= 0 and beyond % stride == 0:
        whole = whole[:-1]  # the text fills its windows: one with nothing but the end of text would count as a row
    encoded = run(row, max_length=max_length, stride=stride)
    assert encoded.rows == (0,) * len(encoded.examples) and encoded.truncated == ()
    done = 0  # tokens of the text that have had their loss so far
    for i, window in enumerate(encoded.examples):
        last = i == len(encoded.examples) - 1
        end = done + len(window) - window.answer_start
        assert window.input_ids == whole[max(0, end - max_length) : end]  # as much context as fits
        assert len(window) == min(max_length, len(whole))
        assert (PLAIN.eos_token_id in window.input_ids) == (last and PLAIN.eos_token_id in whole)
        if i:
            assert end - done == stride or last
        done = end
    assert done == len(whole)
    assert sum(w.answer_length for w in encoded.examples) == len(whole) - 1


def test_settings_are_checked():
    with pytest.raises(UsageError, match=r"--max-length must be at least 2, got 1"):
        run(qa(), max_length=1)


def test_rows_of_several_kinds_keep_their_index():
    encoded = encode([qa(), Row("", "x" * 30, "f", 2, kind="text"), qa()], PLAIN, max_length=35, stride=5)
    assert encoded.rows == (0, 1, 2)
    encoded = encode([qa(), Row("", "x" * 50, "f", 2, kind="text"), qa()], PLAIN, max_length=35, stride=10)
    assert encoded.rows == (0, 1, 1, 1, 2) and encoded.counts()["rows"] == 3


def test_refusals():
    rows = [qa(line=i) for i in range(40)]
    refused = refusal_rows(rows, seed=0)
    assert refused == refusal_rows(rows, seed=0) != refusal_rows(rows, seed=1)
    assert {r.answer for r in refused} <= set(REFUSALS) and len({r.answer for r in refused}) > 5
    assert [(r.prompt, r.place) for r in refused] == [(r.prompt, r.place) for r in rows]
    assert refusal_rows([qa("P", " C", kind="completion")], seed=0, refusals=["No."])[0].answer == " No."
    with pytest.raises(DataError, match=r"f.txt:1: running text has no question to refuse"):
        refusal_rows([Row("", "text", "f.txt", 1, kind="text")], seed=0)


def test_refusals_are_distinct_and_short():
    assert len(set(REFUSALS)) == len(REFUSALS) >= 20
    assert all(len(r) < 60 and r.strip() == r for r in REFUSALS)


MINI = Path(__file__).parents[2] / "shared" / "models" / "tofu-mini-target"


def reference(tokenizer, row):
    """How the small TOFU models were trained, in so many words."""
    prompt = tokenizer(f"Question: {row.prompt}\nAnswer: ")["input_ids"]
    answer = tokenizer(row.answer)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


@pytest.mark.skipif(not MINI.exists(), reason="needs the small TOFU models")
def test_parity_with_the_training_of_the_small_tofu_models():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MINI)
    rows = [
        qa("What gender is author Basil Mahfouz Al-Kuwaiti?", "Author Basil Mahfouz Al-Kuwaiti is male."),
        qa("é {x}", " 1\n"),
    ]
    for row, example in zip(rows, encode(rows, tokenizer, max_length=512, stride=256).examples, strict=True):
        start, ids = example.answer_start, example.input_ids
        assert (list(ids), [-100] * start + list(ids[start:])) == reference(tokenizer, row)
