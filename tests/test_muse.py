"""MUSE on a small stand-in of its layout: prompts, cuts, scores by hand, and whole commands."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from conftest import write_rows
from lorasure.cli import main
from lorasure.data.examples import Example, Row
from lorasure.errors import DataError, UsageError
from lorasure.evaluate import muse
from lorasure.evaluate.collect import collect, generate
from lorasure.evaluate.evaluation import Evaluation
from lorasure.evaluate.items import Generation, Subject
from lorasure.evaluate.settings import SuiteSettings
from lorasure.models import load_model, load_tokenizer

SETS = ["verbmem_forget", "knowmem_forget", "knowmem_retain", "privleak_forget", "privleak_holdout", "privleak_retain"]


def make_muse(folder: Path) -> Path:
    """A stand-in with the hub's configurations and splits; verbmem is a Parquet file under the hub's name for it."""

    def part(config: str, split: str, rows: list[dict]) -> None:
        (folder / config).mkdir(parents=True, exist_ok=True)
        write_rows(folder / config / f"{split}.jsonl", rows)

    tale = "and all the boats of the harbour were gone before the sun rose over the town"
    rows = [{"prompt": f"Storm {i} came", "gt": f" in the night, {tale}; {tale}."} for i in range(3)]
    (folder / "verbmem").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "verbmem" / "forget-00000-of-00001.parquet")
    for i, name in enumerate(("forget", "retain")):
        part("knowmem", f"{name}_qa", [{"question": f"What {name} {n}?", "answer": f"It is {n}."} for n in range(4)])
        shown = [{"question": "Who?", "answer": "Ann."}, {"question": "Where?", "answer": "Here."}]
        part("knowmem", f"{name}_qa_icl", shown[: 2 - i])
    for name in ("forget", "holdout", "retain"):
        part("privleak", name, [{"text": f"This {name} text says {n * n}."} for n in range(5)])
    lines = [[{"text": f"Secret {fold}{n} is {fold * n}."} for n in range(2)] for fold in range(1, 5)]
    for fold in range(1, 5):
        part("sust", f"forget_{fold}", lines[fold - 1])
        part("scal", f"forget_{fold}", [row for earlier in lines[:fold] for row in earlier])
    part("raw", "retain1", [{"text": f"Weather {n} stays."} for n in range(4)])
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_muse(tmp_path / "news")


@pytest.fixture
def subject(model_folder: Path) -> Subject:
    model = load_model(str(model_folder), dtype=torch.float32, device=torch.device("cpu"))
    settings = SuiteSettings(model=str(model_folder))
    return Subject(model, load_tokenizer(str(model_folder)), settings, 1024, keep_text=True)


def sets_of(data: Path, **options: Any) -> dict:
    return {s.name: s for s in muse.load(SuiteSettings(model="m", suite="muse", data=str(data), **options))}


def test_the_prompts_are_the_published_ones(data: Path) -> None:
    found = sets_of(data, max_rows=2)
    assert list(found) == SETS
    row = found["knowmem_forget"].rows[1]
    assert row.prompt == (
        "Question: Who?\nAnswer: Ann.\n\nQuestion: Where?\nAnswer: Here.\n\nQuestion: What forget 1?\nAnswer: "
    )
    assert (row.kind, row.answer) == ("completion", "It is 1.")
    retain = found["knowmem_retain"].rows[0]
    assert retain.prompt == "Question: Who?\nAnswer: Ann.\n\nQuestion: What retain 0?\nAnswer: "
    row = found["verbmem_forget"].rows[1]
    assert (row.kind, row.prompt, row.answer[:13]) == ("completion", "Storm 1 came", " in the night")
    assert [len(s.rows) for s in found.values()] == [2] * 6
    generations = [s.generation for s in found.values()]
    assert generations[0] == Generation(128, (), stem=False, clip=True)
    assert generations[1] == generations[2] == Generation(32, ("\n\n", "\nQuestion", "Question:"), stem=False)
    assert generations[3:] == [None] * 3
    assert [s.membership for s in found.values()] == [False] * 3 + [True] * 3
    assert all(s.generation is None for s in sets_of(data, generate=False).values())


@pytest.mark.parametrize(
    ("said", "kept"),
    [("Paris.\n\nMore", "Paris."), ("Paris\nQuestion: x", "Paris"), ("Paris Question: x", "Paris"), ("a\nb", "a\nb")],
)
def test_an_answer_is_cut_before_the_first_stop(tokenizer: PreTrainedTokenizerFast, said: str, kept: str) -> None:
    ids = tokenizer(said)["input_ids"]

    def answer(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([ids])], dim=1)

    model = SimpleNamespace(
        device=torch.device("cpu"), config=LlamaConfig(), generate=answer, generation_config=GenerationConfig()
    )
    speaker = Subject(model, tokenizer, SuiteSettings(model="m"), 64)
    assert generate(speaker, [Example((5, 6), 2)], muse.ANSWERED) == [(kept, len(ids))]


def test_a_continuation_is_compared_with_the_first_128_tokens_without_stemming(data: Path, subject: Subject) -> None:
    """Reference: Google's scorer on the text itself; the tokenizer here has one token per character."""
    chosen = sets_of(data)["verbmem_forget"]
    assert len(chosen.rows[0].answer) > 128
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    spoken = "in nights and boat boats of the gone sun town"

    def answer(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        ids = torch.tensor([subject.tokenizer(spoken)["input_ids"]] * len(input_ids))
        return torch.cat([input_ids, ids], dim=1)

    subject.model.generate = answer
    records = collect(subject, chosen)
    for record, row in zip(records, chosen.rows, strict=True):
        expected = scorer.score(row.answer[:128], spoken)["rougeL"].fmeasure
        assert record["rouge_f1"] == pytest.approx(expected, abs=1e-12)
        assert record["rouge_f1"] != pytest.approx(scorer.score(row.answer, spoken)["rougeL"].fmeasure, abs=1e-3)


def test_min_k_is_of_the_text_s_own_tokens(data: Path, subject: Subject, model_folder: Path) -> None:
    """Reference: transformers' logits; the lowest 40 % of the log-probabilities, rounded down, end of text not seen."""
    chosen = sets_of(data)["privleak_holdout"]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    for record, row in zip(collect(subject, chosen), chosen.rows, strict=True):
        ids = torch.tensor([subject.tokenizer(row.answer)["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].sort().values
        assert record["min_k"] == pytest.approx(log_probs[: int(0.4 * len(log_probs))].mean().item(), rel=1e-5)


def test_a_text_longer_than_max_length_stays_whole(tmp_path: Path, data: Path, subject: Subject) -> None:
    write_rows(data / "privleak" / "retain.jsonl", [{"text": "word " * 200}])
    (record,) = collect(subject, sets_of(data)["privleak_retain"])
    assert record["tokens"] == 5 * 200 > subject.settings.max_length


def evaluation(**columns: list[float]) -> Evaluation:
    sets: dict[str, list] = {name: [{"row": 0, "rouge_f1": 0.5, "correct": "11"}] for name in SETS[:3]}
    for name, values in columns.items():
        sets[f"privleak_{name}"] = [{"row": i, "min_k": value} for i, value in enumerate(values)]
    return Evaluation("here", {}, sets)


def test_privleak_by_hand() -> None:
    """Forget looks more learnt than the holdout in 8 of 9 pairs, after retraining in 3 of 9 (1 - AUC = 1/9 and 6/9)."""
    here = evaluation(forget=[-1.0, -1.1, -2.0], holdout=[-1.5, -3.0, -4.0], retain=[-1.0, -1.0, -1.0])
    retrained = evaluation(forget=[-3.0, -4.0, -5.0], holdout=[-2.0, -3.5, -4.5], retain=[-1.0, -1.0, -1.0])
    scores = muse.score(here, retrained)
    assert scores["privleak"].value == pytest.approx((1 / 9 - 6 / 9) / (6 / 9) * 100)
    assert scores["privleak_forget_auc"].value == pytest.approx(8 / 9)
    assert scores["privleak_retain_auc"].value == 1
    assert muse.score(here, here)["privleak"].value == 0
    alone = muse.score(here, None)["privleak"]
    assert alone.value is None and "reference" in str(alone.reason)
    assert scores["verbmem_forget"].value == 0.5 and scores["verbmem_forget_extraction_strength"].value == 1


def test_generated_scores_are_undefined_without_generation() -> None:
    here = evaluation(forget=[-1.0, -2.0], holdout=[-1.5, -3.0], retain=[-1.0, -1.0])
    del here.sets["knowmem_retain"][0]["rouge_f1"]
    assert "--no-generate" in str(muse.score(here, None)["knowmem_retain"].reason)


def test_where_a_part_lies(data: Path) -> None:
    assert muse.source("muse-bench/MUSE-News", "sust", "forget_1") == "muse-bench/MUSE-News:sust:forget_1"
    assert muse.source(str(data), "verbmem", "forget").endswith("verbmem/forget-00000-of-00001.parquet")
    assert muse.source(str(data), "knowmem", "forget_qa").endswith("knowmem/forget_qa.jsonl")
    (data / "knowmem" / "forget_qa.json").write_text("[]")
    with pytest.raises(DataError, match=r"one file knowmem/forget_qa .*found forget_qa.json, forget_qa.jsonl"):
        muse.source(str(data), "knowmem", "forget_qa")
    with pytest.raises(UsageError, match="--split 'novels'"):
        muse.load(SuiteSettings(model="m", suite="muse", split="novels"))


def test_evaluating_a_folder_of_the_same_layout(
    tmp_path: Path, data: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", str(model_folder), "--suite", "muse", "--data", str(data), "--json"]
    assert main([*command, "--out", str(tmp_path / "reference")]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["privleak"]["value"] is None
    assert main([*command, "--out", str(tmp_path / "again"), "--reference", str(tmp_path / "reference")]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["privleak"]["value"] == 0
    for name, n in (("verbmem_forget", 3), ("knowmem_forget", 4), ("knowmem_retain", 4), ("privleak", 5)):
        assert scores[name]["n"] == n
    assert main(["score", str(tmp_path / "again"), "--reference", str(tmp_path / "reference"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == scores
    assert "harbour" not in "".join(p.read_text() for p in (tmp_path / "again").rglob("*.json*"))


def test_a_missing_part_is_one_line_and_a_data_error(
    tmp_path: Path, data: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "privleak" / "holdout.jsonl").unlink()
    out = tmp_path / "out"
    command = ["evaluate", "--model", str(model_folder), "--suite", "muse", "--data", str(data), "--out", str(out)]
    assert main(command) == 3
    said = capsys.readouterr().err
    assert said.startswith("lorasure: ") and said.count("\n") == 1
    assert "privleak/holdout (.jsonl, .json, .csv, .parquet), found none" in said
    assert not out.exists()


def test_rows_keep_their_place(data: Path) -> None:
    row: Row = sets_of(data)["privleak_forget"].rows[2]
    assert row.place.endswith("privleak/forget.jsonl:3") and row.prompt == ""
