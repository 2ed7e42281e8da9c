"""`lorasure demo`: the whole job on invented people, with a model that it trains itself. Nothing is downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import artifacts, folders, lora
from .config import DemoSettings, FinetuneSettings, ForgetSettings, ModelSettings
from .data.examples import Row
from .data.fictional import countries, people, person_rows, split, world_rows
from .data.readers import read_rows
from .errors import ANEW
from .evaluate.collect import collect, generate
from .evaluate.evaluation import Evaluation
from .evaluate.items import EvaluationSet, Generation, Subject, items
from .evaluate.metrics import Score
from .evaluate.tofu import memorisation, quality, set_scores, utility
from .finetuning import finetune
from .models import load_model, load_tokenizer
from .pipeline import forget
from .progress import Reporter
from .small_model import Size, make_model

PEOPLE, FORGOTTEN, COUNTRIES = 40, 5, 12
SIZE = Size(vocabulary=1024, width=128, inner=352, layers=4, context=256)
LEARN = {"lr": 2e-3, "epochs": 40, "batch_size": 16, "schedule": "cosine", "warmup": 0.05}
LEARN |= {"max_length": 128, "tokens_per_batch": 1024}  # a step in one pass
# What is said of all people is said in the same sentences, which must stay: bga would take them along (docs/log.md).
FORGET: dict[str, Any] = {"epochs": 8, "batch_size": 8, "max_length": 128, "loss": "bigram", "lambda_": 4.0}
SHOWN_ANSWERS = 3
KEPT = {"retain": "retain", "world_facts": "world"}  # set -> file
BUDGET = 1024  # padded tokens per pass


def demo(settings: DemoSettings, reporter: Reporter | None = None) -> dict[str, dict[str, Score]]:
    """Make people, a target and a retrained reference, forget some people, and print the three models side by side.

    Returns the scores: model name -> score name -> Score. Everything is left in `settings.out`.
    """
    reporter = reporter or Reporter(quiet=True)
    out = Path(settings.out)
    with folders.new_folder(out, settings.overwrite) as folder:
        make_data(folder, settings.seed)
        make_start(folder, "start", settings.seed)
    artifacts.begin(out)  # models and a run come in here
    try:
        _make_models(out, settings.seed, reporter)
        with reporter.stage("compare"):
            compared = {name: _examine(out, name) for name in ("target", "forgotten", "retrained")}
    except BaseException as error:
        error.add_note(ANEW)  # also where `finetune` or `forget` alone could be resumed
        raise
    scores = {name: _scores(seen, compared["retrained"]) for name, seen in compared.items()}
    _print(compared, scores, out)
    return scores


def _make_models(out: Path, seed: int, reporter: Reporter) -> None:
    """The target, the retrained reference, and the run in which the target forgets."""
    for name, data in (("target", "all"), ("retrained", "kept")):
        reporter.note(f"Training the {name} model on {data}.jsonl.")
        options = {"model": f"{out}/start", "data": f"{out}/{data}.jsonl", "out": f"{out}/{name}"}
        finetune(FinetuneSettings(**options, **LEARN, seed=seed), reporter)
    reporter.note(f"Forgetting {FORGOTTEN} of {PEOPLE} people.")
    files = {"forget": f"{out}/forget.jsonl", "retain": f"{out}/retain.jsonl", "out": f"{out}/run"}
    forget(ForgetSettings(model=f"{out}/target", **files, **FORGET, seed=seed), reporter)


def make_data(folder: Path, seed: int) -> None:
    """all, kept (all but the forgotten people), forget, retain and world, as JSON lines."""
    subjects = people(PEOPLE, seed)
    world = world_rows(countries(COUNTRIES, seed), seed)
    gone, stay = split(person_rows(subjects, seed), [s.group for s in subjects[:FORGOTTEN]])
    sets = {"all": gone + stay + world, "kept": stay + world, "forget": gone, "retain": stay, "world": world}
    for name, rows in sets.items():
        artifacts.write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def make_start(folder: Path, name: str, seed: int) -> None:
    """A model with random weights in `folder / name`, and a tokenizer for the data that is in `folder`."""
    rows = read_rows(folder / "all.jsonl").rows
    make_model(folder / name, (f"{row.prompt} {row.answer}" for row in rows), SIZE, seed)


@dataclass(frozen=True)
class Seen:
    """One model's records on the three sets, and its own answers to a few forget questions."""

    evaluation: Evaluation
    questions: list[Row]
    answers: list[str]


def _examine(folder: Path, name: str) -> Seen:
    source = folder / ("target" if name == "forgotten" else name)
    model: Any = load_model(str(source), dtype=torch.float32, device=torch.device("cpu"))
    if name == "forgotten":
        model = lora.load_adapter(model, folder / "run" / artifacts.ADAPTER)
    subject = Subject(model, load_tokenizer(str(source)), ModelSettings(model=str(source)), BUDGET)
    files = {"forget": "forget", **KEPT}
    sets = {part: read_rows(folder / f"{file}.jsonl").rows for part, file in files.items()}
    records = {part: collect(subject, EvaluationSet(part, rows)) for part, rows in sets.items()}
    questions = list(sets["forget"][:: len(sets["forget"]) // SHOWN_ANSWERS][:SHOWN_ANSWERS])
    answers = generate(subject, [item.prompt for item in items(subject, questions)], Generation(64))
    return Seen(Evaluation(name, {}, records), questions, [text for text, _ in answers])


def _scores(seen: Seen, retrained: Seen) -> dict[str, Score]:
    found = set_scores(seen.evaluation, "forget") | memorisation(seen.evaluation, "forget")
    found["forget_quality"] = quality(seen.evaluation, retrained.evaluation)
    return found | {"utility": utility(seen.evaluation, kept=list(KEPT), without=["rouge"])}


def _print(compared: dict[str, Seen], scores: dict[str, dict[str, Score]], out: Path) -> None:
    titles = {"target": "before", "forgotten": "after", "retrained": "retrained"}
    console = Console(highlight=False)
    table = Table("score", *titles.values(), title="the forgotten people, and the rest (95 % interval)")
    labels = {
        "probability": "forget: probability",
        "truth_ratio": "forget: truth ratio",
        "extraction_strength": "forget: extraction",
        "forget_quality": "log10 forget quality",
        "utility": "model utility",
    }
    for key, label in labels.items():
        table.add_row(label, *(_shown(scores[name][key]) for name in titles))
    console.print(table)
    console.print("retrained: a model that never saw the forgotten people, what forgetting should look like.")
    for i, row in enumerate(compared["target"].questions):
        console.print(f"\nQ: {row.prompt}", markup=False, soft_wrap=True)
        for name, title in titles.items():
            console.print(f"  {title:<10} {compared[name].answers[i]}", markup=False, soft_wrap=True)
    console.print(f"\nAdapter for the untouched model {out}/target: {out}/run/adapter", markup=False, soft_wrap=True)


def _shown(score: Score) -> str:
    """The value, and half the width of its 95 % interval."""
    half = "" if score.low is None or score.high is None else f" ±{(score.high - score.low) / 2:.3f}"
    return f"{score.value:.3f}{half}"
