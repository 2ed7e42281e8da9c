"""Rows longer than the model takes: cut and counted where they become tokens, and answers that end there."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer, BloomConfig, LlamaConfig

from architectures import tiny_model
from conftest import write_rows
from lorasure import artifacts, attacking, pipeline
from lorasure.config import ForgetSettings, ModelSettings
from lorasure.data.examples import Example, Row
from lorasure.data.load import encode_rows, load_data, model_config, takes
from lorasure.errors import DataError, UsageError
from lorasure.evaluate.collect import generate
from lorasure.evaluate.items import UNCUT, Generation, Subject, items
from lorasure.models import load_model, load_tokenizer, pick_device, pick_dtype
from test_attacks import options

TAKES = 64  # far less than --max-length


@pytest.fixture(scope="module")
def short_model(tmp_path_factory, tokenizer):
    """A GPT-2, which has no position for a token too many."""
    folder = tmp_path_factory.mktemp("short")
    tiny_model("gpt2", n_positions=TAKES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def row(i, length):
    return {"question": f"Q{i}?", "answer": f"{i} ".ljust(length, "a")}


def test_what_a_model_takes_is_in_its_configuration(short_model, tokenizer, tmp_path):
    assert takes(model_config(load_tokenizer(str(short_model)))) == TAKES and model_config(tokenizer) is None
    tokenizer.save_pretrained(tmp_path)
    for config, most in ((BloomConfig(), None), (LlamaConfig(max_position_embeddings=40), 40)):
        config.save_pretrained(tmp_path)
        assert takes(model_config(AutoTokenizer.from_pretrained(tmp_path))) == most
    found = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert model_config(found) is None


@pytest.mark.parametrize("fit", [True, False])
def test_a_token_that_the_model_lacks_is_refused_with_its_row(model_folder, tmp_path, fit):
    """A tokenizer that got a token, of a model that did not."""
    grown = AutoTokenizer.from_pretrained(model_folder)
    grown.add_tokens(["<more>"])
    grown.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    tokenizer, settings = AutoTokenizer.from_pretrained(tmp_path), ModelSettings(model="m")
    rows = [Row("Who?", "Ann.", "f", 1), Row("Who is <more>?", "Ann.", "f", 2)]
    assert encode_rows(rows[:1], settings, tokenizer, fit=fit).examples
    with pytest.raises(DataError, match=r"^f:2: a token of this row is not among the 257 that the model has"):
        encode_rows(rows, settings, tokenizer, fit=fit)


def test_rows_are_cut_where_the_model_ends(short_model, tmp_path):
    tokenizer, settings = load_tokenizer(str(short_model)), ModelSettings(model=str(short_model))
    data = load_data(str(write_rows(tmp_path / "rows.jsonl", [row(1, 20), row(2, 100)])), settings, tokenizer)
    assert [len(e) for e in data.examples] == [len("Question: Q1?\nAnswer: ") + 20 + 1, TAKES]
    assert data.about()["truncated"] == 1
    assert data.notes("forget") == ["forget: 1 rows truncated to the model's context; see data.json."]
    with pytest.raises(DataError, match="answer fully truncated: prompt has 80 tokens, the model's context is 64"):
        encode_rows([Row("q" * 80, "a", "f", 1, kind="completion")], settings, tokenizer)
    text = [Row("", "a" * 100, "f", 1, kind="text")]
    assert [len(e) for e in encode_rows(text, settings, tokenizer).examples] == [TAKES] * 3
    with pytest.raises(UsageError, match=r"--stride must be in \[1, 63\] \(below the model's context\), got 100"):
        encode_rows(text, ModelSettings(model="m", stride=100), tokenizer)
    subject = Subject(None, tokenizer, settings, 512)
    asked = [Row("q", "a" * 100, "f", 1)]
    assert [len(items(subject, asked, most)[0].example) for most in (None, 2048, UNCUT)] == [TAKES, TAKES, 121]


@pytest.fixture(scope="module")
def run(short_model, tmp_path_factory):
    """A run on rows that fill the model's context to the last token, and more."""
    folder = tmp_path_factory.mktemp("full")
    forget = write_rows(folder / "forget.jsonl", [row(i, 30 + 10 * i) for i in range(6)])
    retain = write_rows(folder / "retain.jsonl", [row(i, 30 + 10 * i) for i in range(6, 12)])
    given: dict[str, Any] = {
        "model": str(short_model),
        "forget": str(forget),
        "retain": str(retain),
        "out": str(folder / "run"),
    }
    return pipeline.forget(ForgetSettings(**given, rank=2, epochs=1, batch_size=3, lr=1e-2, merge=True)).folder


def test_a_run_on_rows_that_are_too_long(run):
    data = artifacts.read_json(run / "data.json")
    assert data["forget"]["truncated"] == 4 and data["retain"]["truncated"] == 6


def test_attacks_that_need_more_room_are_not_run(run, tmp_path):
    asked = options(attacks="prefix,few-shot,prefill,sample", out=str(tmp_path / "attacks"), generate_rows=6)
    about, lines = attacking.attack(run, asked)
    assert {x["attack"]: x["reason"] for x in about["not_run"]} == {
        "prefix": "a question, the prefix and an answer are up to 90 tokens, the model takes 64",
        "few-shot": "3 examples and a question are up to 537 tokens, the model takes 64",
    }
    assert {x["attack"] for x in lines} == {"none", "prefill", "sample"}


def test_an_answer_ends_with_the_context_and_no_other_one_does(short_model):
    model = load_model(str(short_model), dtype=pick_dtype("float32", pick_device("cpu")), device=pick_device("cpu"))
    subject = Subject(model, load_tokenizer(str(short_model)), ModelSettings(model="m"), 512)
    subject.tokenizer.eos_token_id, model.generation_config.eos_token_id = 999, None  # no answer ends by itself
    long, short = Example(tuple(range(60)), 60), Example(tuple(range(7, 17)), 10)
    both = generate(subject, [long, short], Generation(20))
    assert [tokens for _, tokens in both] == [4, 20]
    assert both == [generate(subject, [one], Generation(20))[0] for one in (long, short)]
