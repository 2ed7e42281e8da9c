"""TOFU's scores: on rows made here, and on the small models trained on real rows where those are at hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import SHARED, tofu_folder
from lorasure.config import ForgetSettings, ModelSettings
from lorasure.data.readers import read_rows
from lorasure.errors import DataError, UsageError
from lorasure.evaluate.collect import collect
from lorasure.evaluate.evaluation import Evaluation
from lorasure.evaluate.items import EvaluationSet, Subject
from lorasure.evaluate.settings import SuiteSettings
from lorasure.evaluate.tofu import capped, load, memorisation, quality, ratios, score, set_scores, utility
from lorasure.lora import load_adapter
from lorasure.models import load_model, load_tokenizer
from lorasure.pipeline import forget

MODELS, TOFU = SHARED / "models", SHARED / "data" / "tofu"
needs_models = pytest.mark.skipif(not MODELS.is_dir(), reason="the small TOFU models are not at hand")


def evaluation(**sets: list[dict]) -> Evaluation:
    """Records given by what differs: everything else is filled in."""
    filled = {
        name: [{"row": i, "id": str(i), "tokens": 1, "correct": "1", **record} for i, record in enumerate(records)]
        for name, records in sets.items()
    }
    return Evaluation("made", {}, filled)


RETAIN = [
    {"nll": 0.1, "paraphrase_nll": 0.2, "wrong_nll": [1.0, 2.0], "rouge_recall": 0.5},
    {"nll": 0.3, "paraphrase_nll": 0.4, "wrong_nll": [0.5, 3.0], "rouge_recall": 1.0},
]
WORLD = [{"nll": 0.5, "paraphrase_nll": 0.5, "wrong_nll": [1.5, 2.5], "rouge_recall": 0.25}]


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
@pytest.mark.parametrize("without", [[], ["rouge"]])
def test_utility_is_the_harmonic_mean_of_the_parts_by_hand(mean: str, without: list[str]) -> None:
    parts = [] if without else [0.75, 0.25]
    for records in (RETAIN, WORLD):
        values = []
        for record in records:
            wrong = record["wrong_nll"]
            top = math.exp(-sum(wrong) / len(wrong))
            if mean == "arithmetic":
                top = sum(math.exp(-w) for w in wrong) / len(wrong)
            values.append(max(0, 1 - top / math.exp(-record["paraphrase_nll"])))
        parts.append(sum(values) / len(values))
    parts.append((math.exp(-0.1) + math.exp(-0.3)) / 2)
    parts.append(math.exp(-0.5) / (math.exp(-0.5) + math.exp(-1.5) + math.exp(-2.5)))
    made = evaluation(retain=RETAIN, world_facts=WORLD)
    found = utility(made, mean, kept=["retain", "world_facts"], without=without)
    assert found.value == pytest.approx(len(parts) / sum(1 / p for p in parts))


def test_the_two_truth_ratios_differ() -> None:
    made = evaluation(retain=RETAIN)
    assert ratios(made, "retain") != ratios(made, "retain", "arithmetic")


def test_every_score_of_the_suite_has_n_and_an_interval_or_a_reason() -> None:
    made = evaluation(forget=RETAIN * 3, retain=RETAIN * 2, real_authors=RETAIN * 2, world_facts=RETAIN * 2)
    found = score(made, made)
    assert found["forget_quality"].value == 0 and found["forget_quality"].extra["p"] == 1
    assert found["model_utility"].value != found["model_utility_arithmetic"].value
    for name, one in found.items():
        assert one.n > 0
        assert (one.low is not None) or name == "forget_quality" or one.reason, name
    for record in made.sets["retain"]:
        del record["rouge_recall"]
    without = score(made, None)
    assert without["model_utility"].value is None and "--no-generate" in str(without["model_utility"].reason)
    assert without["model_utility_without_rouge"].value == found["model_utility_without_rouge"].value
    assert without["forget_quality"].value is None and "--reference" in str(without["forget_quality"].reason)


def test_sets_come_from_a_folder_capped_and_an_unknown_split_or_missing_file_is_named(tmp_path: Path) -> None:
    folder = tofu_folder(tmp_path / "tofu")
    given = {"model": "m", "suite": "tofu", "data": str(folder), "split": "forget01"}
    sets = load(SuiteSettings(**given, max_rows=2))
    assert [(s.name, len(s.rows)) for s in sets] == [
        ("forget", 2), ("retain", 2), ("real_authors", 2), ("world_facts", 2)
    ]  # fmt: skip
    assert len(load(SuiteSettings(**given, max_rows=0))[0].rows) == 3
    assert load(SuiteSettings(**given, generate=False))[0].generation is None
    with pytest.raises(UsageError, match=r"forget02.*forget01, forget05"):
        load(SuiteSettings(**{**given, "split": "forget02"}))
    (folder / "retain_perturbed.json").unlink()
    with pytest.raises(DataError, match=r"retain_perturbed\.json: no such file"):
        load(SuiteSettings(**given))


def _subject(folder: Path, adapter: Path | None = None) -> Subject:
    model = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    if adapter:
        model = load_adapter(model, adapter)
    return Subject(model, load_tokenizer(str(folder)), ModelSettings(model=str(folder)), 1024)


def _records(subject: Subject, file: str, count: int | None = None) -> list[dict]:
    return collect(subject, EvaluationSet(file, capped(read_rows(TOFU / f"{file}.json").rows, count or 0)))


@needs_models
@pytest.mark.slow
def test_the_target_has_the_published_utility_and_forget_quality() -> None:
    """Reference: the figures stated with the models (utility .824, log10 forget quality -5.7 for forget01)."""
    target = _subject(MODELS / "tofu-mini-target")
    sets = {"retain": _records(target, "retain_perturbed", 200)}
    sets |= {name: _records(target, f"{name}_perturbed") for name in ("real_authors", "world_facts")}
    sets["forget"] = _records(target, "forget01_perturbed")
    known = Evaluation("target", {}, sets)
    assert utility(known, "arithmetic", without=["rouge"]).value == pytest.approx(0.824, abs=5e-4)
    unseen = _records(_subject(MODELS / "tofu-mini-retain99"), "forget01_perturbed")
    assert quality(known, Evaluation("retrained", {}, {"forget": unseen})).value == pytest.approx(-5.7, abs=0.05)


@needs_models
@pytest.mark.slow
def test_forgetting_real_rows_beats_the_target_on_every_forget_score(tmp_path: Path) -> None:
    target, rows = MODELS / "tofu-mini-target", (TOFU / "full.json").read_text().splitlines()
    keep = tmp_path / "keep.jsonl"
    keep.write_text("\n".join(rows[:80] + rows[3600:3680]) + "\n")
    settings = {"model": str(target), "forget": str(TOFU / "forget01.json"), "retain": str(keep)}
    result = forget(ForgetSettings(**settings, out=str(tmp_path / "run"), lr=2e-3, batch_size=8, epochs=3))

    def forgotten(folder: Path, adapter: Path | None = None) -> Evaluation:
        return Evaluation(folder.name, {}, {"forget": _records(_subject(folder, adapter), "forget01_perturbed")})

    def scores(one: Evaluation) -> dict[str, float]:
        found = set_scores(one, "forget") | memorisation(one, "forget") | {"quality": quality(one, reference)}
        return {name: float(s.value) for name, s in found.items() if s.value is not None}

    reference = forgotten(MODELS / "tofu-mini-retain99")
    before, after = scores(forgotten(target)), scores(forgotten(target, result.adapter))
    assert after["quality"] > before["quality"] + 1
    assert after["probability"] < 0.5 < before["probability"]
    assert after["extraction_strength"] < 0.5 < before["extraction_strength"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["retain"]["value"] > 0.75 * summary["before"]["retain"]["value"]
