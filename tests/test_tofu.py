"""TOFU's scores: on rows made here, and on the small models trained on real rows where those are at hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import SHARED, write_rows
from lorasure.config import ForgetSettings, ModelSettings
from lorasure.data.readers import read_rows
from lorasure.errors import DataError
from lorasure.evaluate.collect import ChoiceRecords, choice_records, greedy_answers
from lorasure.evaluate.tofu import forget_scores, ratios, utility
from lorasure.lora import load_adapter
from lorasure.models import load_model, load_tokenizer
from lorasure.pipeline import forget

MODELS, TOFU = SHARED / "models", SHARED / "data" / "tofu"
needs_models = pytest.mark.skipif(not MODELS.is_dir(), reason="the small TOFU models are not at hand")


def test_choice_records_are_the_model_s_own_losses(tmp_path: Path, model_folder: Path) -> None:
    """Reference: transformers' own loss, one sequence at a time."""
    row = {"question": "Who?", "answer": "Ann.", "paraphrased_answer": "It is Ann.", "perturbed_answer": ["Bob.", "C."]}
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [row, {**row, "question": "Which one?"}])).rows
    model, tokenizer = load_model(str(model_folder), dtype=torch.float32, device=torch.device("cpu")), None
    tokenizer = load_tokenizer(str(model_folder))
    found = choice_records(model, tokenizer, rows, ModelSettings(model=str(model_folder)), token_budget=64)

    def loss(answer: str) -> float:
        prompt = tokenizer("Question: Who?\nAnswer: ")["input_ids"]
        ids = prompt + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        return model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()

    expected = [loss(a) for a in ("Ann.", "It is Ann.", "Bob.", "C.")]
    assert [found.true[0], found.paraphrase[0], *found.wrong[0]] == pytest.approx(expected, rel=1e-5)
    assert len(found.correct[0]) == len("Ann.") + 1
    del row["perturbed_answer"]
    rows = read_rows(write_rows(tmp_path / "none.jsonl", [row])).rows
    with pytest.raises(DataError, match=r"none\.jsonl:1: no list of wrong answers"):
        choice_records(model, tokenizer, rows, ModelSettings(model=str(model_folder)), token_budget=64)


def test_greedy_answers_do_not_depend_on_what_else_is_in_the_batch(model_folder: Path, data_files: tuple) -> None:
    model = load_model(str(model_folder), dtype=torch.float32, device=torch.device("cpu"))
    tokenizer, settings = load_tokenizer(str(model_folder)), ModelSettings(model=str(model_folder))
    rows = [*read_rows(data_files[0]).rows[:2], *read_rows(data_files[1]).rows[:2]]
    together = greedy_answers(model, tokenizer, rows, settings, max_new_tokens=6)
    alone = [greedy_answers(model, tokenizer, [row], settings, max_new_tokens=6)[0] for row in rows]
    assert together == alone


def test_utility_is_the_harmonic_mean_of_the_parts_by_hand() -> None:
    retain = ChoiceRecords([0.1, 0.3], [0.2, 0.4], [[1.0, 2.0], [0.5, 3.0]], [(True,), (True,)])
    world = ChoiceRecords([0.5], [0.5], [[1.5, 2.5]], [(True,)])
    for mean in ("geometric", "arithmetic"):
        parts = []
        for records in (retain, world):
            values = []
            for para, wrong in zip(records.paraphrase, records.wrong, strict=True):
                top = math.exp(-sum(wrong) / len(wrong))
                if mean == "arithmetic":
                    top = sum(math.exp(-w) for w in wrong) / len(wrong)
                values.append(max(0, 1 - top / math.exp(-para)))
            parts.append(sum(values) / len(values))
        parts.append((math.exp(-0.1) + math.exp(-0.3)) / 2)
        parts.append(math.exp(-0.5) / (math.exp(-0.5) + math.exp(-1.5) + math.exp(-2.5)))
        expected = len(parts) / sum(1 / p for p in parts)
        assert utility({"retain": retain, "world_facts": world}, mean).value == pytest.approx(expected)
    assert ratios(retain) != ratios(retain, "arithmetic")


def test_forget_quality_without_a_reference_is_undefined_and_says_why() -> None:
    records = ChoiceRecords([0.1], [0.2], [[1.0]], [(True,)])
    score = forget_scores(records, None)["forget_quality"]
    assert score.value is None
    assert "retrained reference" in str(score.reason)


def _records(folder: Path, file: str, count: int | None, adapter: Path | None = None) -> ChoiceRecords:
    model = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    if adapter:
        model = load_adapter(model, adapter)
    rows = read_rows(TOFU / f"{file}.json").rows[:count]
    return choice_records(model, load_tokenizer(str(folder)), rows, ModelSettings(model=str(folder)), token_budget=1024)


@needs_models
@pytest.mark.slow
def test_the_target_has_the_published_utility_and_forget_quality() -> None:
    """Reference: the figures stated with the models (utility .824, log10 forget quality -5.7 for forget01)."""
    target = MODELS / "tofu-mini-target"
    sets = {"retain": _records(target, "retain_perturbed", 200)}
    sets |= {name: _records(target, f"{name}_perturbed", None) for name in ("real_authors", "world_facts")}
    assert utility(sets, "arithmetic").value == pytest.approx(0.824, abs=5e-4)
    known = _records(target, "forget01_perturbed", None)
    reference = _records(MODELS / "tofu-mini-retain99", "forget01_perturbed", None)
    assert forget_scores(known, reference)["forget_quality"].value == pytest.approx(-5.7, abs=0.05)


@needs_models
@pytest.mark.slow
def test_forgetting_real_rows_beats_the_target_on_every_forget_score(tmp_path: Path) -> None:
    target, rows = MODELS / "tofu-mini-target", (TOFU / "full.json").read_text().splitlines()
    keep = tmp_path / "keep.jsonl"
    keep.write_text("\n".join(rows[:400] + rows[3600:3960]) + "\n")
    settings = {"model": str(target), "forget": str(TOFU / "forget01.json"), "retain": str(keep)}
    result = forget(ForgetSettings(**settings, out=str(tmp_path / "run"), lr=2e-3, batch_size=8))
    reference = _records(MODELS / "tofu-mini-retain99", "forget01_perturbed", None)
    before = forget_scores(_records(target, "forget01_perturbed", None), reference)
    after = forget_scores(_records(target, "forget01_perturbed", None, result.adapter), reference)
    assert after["forget_quality"].value > before["forget_quality"].value + 1
    assert after["probability"].value < 0.5 < before["probability"].value
    assert after["extraction_strength"].value < 0.5 < before["extraction_strength"].value
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["retain"]["value"] > 0.75 * summary["before"]["retain"]["value"]
