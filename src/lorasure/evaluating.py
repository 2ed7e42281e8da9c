"""`lorasure evaluate`: a model on a suite, records first, then scores; `lorasure score`: scores from records alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import artifacts, folders, lora
from .baselines.subtracted import Subtracted, load_assistant
from .data.encode import resolved_template
from .data.load import rows_hash
from .errors import DataError
from .evaluate.evaluation import ABOUT, HIDDEN, Evaluation, Record, RecordFile, check_comparable, write_scores
from .evaluate.inside import layer_means
from .evaluate.items import EvaluationSet, Subject, items, measured_hash
from .evaluate.logs import open_evaluation, write_log
from .evaluate.metrics import Score
from .evaluate.settings import EvaluateSettings, ScoreSettings, SuiteSettings
from .evaluate.suites import SUITES, Suite
from .forward import base_of
from .models import dtype_name, fingerprint, load_model, load_tokenizer, pick_device, pick_dtype, pick_token_budget
from .outcome import ABOUT_ASSISTANT, ASSISTANT
from .progress import Reporter
from .registry import lookup
from .yaml_file import read_yaml

HIDDEN_ROWS = 100
# Settings that an evaluation of a run takes from it, unless given: its rows, and if it takes these how they are read.
KEYS_OF_RUN = ("forget", "retain")
WITH_ROWS = ("prompt_key", "answer_key", "text_key")
NOT_IDENTITY = ("out", "overwrite", "resume", "json", "reference", "device", "tokens_per_batch")


def evaluate_model(settings: EvaluateSettings, reporter: Reporter | None = None) -> dict[str, Score]:
    """Measure a model on a suite; leaves records and scores in `settings.out` and returns the scores.

    An evaluation that was interrupted goes on with `resume`; its records are the same, bit for bit, on one machine.
    """
    reporter = reporter or Reporter(quiet=True)
    suite = lookup(SUITES, settings.suite, "--suite")
    settings = _with_run(settings)
    out = Path(settings.out)
    folders.check_new(out, settings.overwrite, settings.resume, folders.read_by(settings), ABOUT)
    with reporter.held():
        with reporter.stage("read data"):
            sets = suite.sets(settings)
        reference = open_evaluation(Path(settings.reference)) if settings.reference else None
        with reporter.stage("load model"):
            subject = load_subject(settings)
        about = describe(subject, settings, sets)
        if reference:
            check_comparable(expected(subject, about, sets), reference)
    options = {"resume": settings.resume, "overwrite": settings.overwrite, "note": reporter.note}
    with folders.resumable_folder(out, _identity(settings, about), **options) as folder:
        records = measure(subject, suite, sets, settings, reporter, folder)
        hidden = keep_hidden(subject, sets, folder)
        found = Evaluation(str(out), about | {"seconds": subject.seconds, "guards": subject.guards}, records, hidden)
        scores = suite.score(found, reference)
        artifacts.write_json(folder / ABOUT, found.about)
        write_scores(folder, scores)
    return scores


def _with_run(settings: EvaluateSettings) -> EvaluateSettings:
    """The settings, with the template and the data of the run whose adapter is evaluated where none is named."""
    if settings.adapter is None:
        return settings
    change_folder(settings.adapter)
    config = Path(settings.adapter) / artifacts.CONFIG
    stored = read_yaml(config) if config.is_file() else {}
    names = ["template", *(KEYS_OF_RUN if settings.suite == "own" else ())]
    names += WITH_ROWS if settings.suite == "own" and settings.forget is None else ()
    not_given = [name for name in names if getattr(settings, name) == getattr(EvaluateSettings, name)]
    return replace(settings, **{name: stored[name] for name in not_given if name in stored})


def change_folder(given: str) -> Path:
    """The adapter or assistant that --adapter names: that of a run, or a folder of PEFT's."""
    path = Path(given).expanduser()
    for folder in (path / artifacts.ADAPTER, path / ASSISTANT, path):
        if (folder / lora.ADAPTER_FILES[1]).is_file():
            if folder != path:
                artifacts.check_run(path, *(f"{folder.name}/{name}" for name in lora.ADAPTER_FILES))
            return folder
    if (merged := path / artifacts.MERGED).is_dir():
        raise DataError(f"--adapter {given}: this run made whole weights; give --model {merged} instead.")
    raise DataError(f"--adapter {given}: neither a run folder with an adapter nor a PEFT adapter.")


def check_base(run: Path, model: str, base: Mapping[str, Any]) -> None:
    """The fingerprint `base` of `model` is that of the run's own base; a folder that is no run says nothing of one."""
    if not (run / artifacts.MANIFEST).is_file():
        return
    artifacts.check_run(run, artifacts.SUMMARY)
    with artifacts.as_written(run / artifacts.SUMMARY):
        files = artifacts.read_json(run / artifacts.SUMMARY)["base"]["files"]
    if base["files"] != files:
        raise DataError(f"--model {model}: not the weights that {run} was made with.")


def load_change(model: Any, folder: Path, scale: float = 1.0) -> Any:
    """The base with what `change_folder` found, `scale` times."""
    if (folder / ABOUT_ASSISTANT).is_file():
        return load_assistant(model, folder, scale)
    return lora.scaled(lora.load_adapter(model, folder), scale)


def load_subject(settings: SuiteSettings) -> Subject:
    """The model of the settings, with its adapter if there is one."""
    device = pick_device(settings.device)
    adapter = change_folder(settings.adapter) if settings.adapter else None
    options: dict[str, Any] = {"revision": settings.revision, "allow_pickle": settings.allow_pickle}
    tokenizer = load_tokenizer(settings.model, **options)
    dtype = pick_dtype(settings.dtype, device)
    model: Any = load_model(settings.model, dtype=dtype, device=device, quantize=settings.quantize, **options)
    base = fingerprint(model, settings.located()["model"])  # before the adapter, whose parameters would be counted
    if adapter:
        check_base(adapter.parent, settings.model, base)
        model = load_change(model, adapter)
    budget = pick_token_budget(settings.tokens_per_batch, device)
    return Subject(model, tokenizer, settings, budget, settings.keep_text, base)


def describe(subject: Subject, settings: SuiteSettings, sets: Sequence[EvaluationSet]) -> dict[str, Any]:
    """evaluation.json: what was measured on what. Hashes and counts, never text."""
    located = settings.located()
    adapter = None
    if settings.adapter:
        weights = change_folder(settings.adapter) / lora.ADAPTER_FILES[0]
        adapter = {"source": located["adapter"], "sha256": artifacts.sha256(weights)}
    return {
        "kind": "evaluation",
        "suite": settings.suite,
        "split": settings.split or SUITES[settings.suite].split,
        "model": subject.base,
        "adapter": adapter,
        "template": resolved_template(settings.template, subject.tokenizer)[0],
        "tokenizer": tokenizer_hash(subject.tokenizer),
        "dtype": dtype_name(base_of(subject.model).dtype),
        "sets": {s.name: _about_rows(subject, s) for s in sets},
        "borrowed": any("borrowed" in row.extra for s in sets for row in s.rows),
        "settings": located,
        "versions": artifacts.versions(),
    }


def _about_rows(subject: Subject, chosen: EvaluationSet) -> dict[str, Any]:
    tokens = measured_hash(subject.items(chosen)) if chosen.rows else None
    return {"rows": len(chosen.rows), "sha256": rows_hash(chosen.rows), "tokens": tokens}


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over the vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _identity(settings: EvaluateSettings, about: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in settings.located().items() if key not in NOT_IDENTITY}
    own["dtype"] = about["dtype"]
    measured = {f"{name} rows": part["sha256"] for name, part in about["sets"].items()}
    measured |= {f"{name} tokens": part["tokens"] for name, part in about["sets"].items()}
    adapter = about["adapter"] and about["adapter"]["sha256"]
    return own | measured | {"weights": about["model"]["files"], "adapter weights": adapter}


def expected(subject: Subject, about: dict[str, Any], sets: Sequence[EvaluationSet]) -> Evaluation:
    """The evaluation to be, without what is measured, to refuse a wrong reference before hours of work."""
    rows = {s.name: [{"row": item.index, "id": item.id} for item in subject.items(s)] for s in sets if s.rows}
    return Evaluation("this evaluation", about, rows)


def measure(
    subject: Subject,
    suite: Suite,
    sets: Sequence[EvaluationSet],
    settings: SuiteSettings,
    reporter: Reporter,
    folder: Path | None = None,
) -> dict[str, list[Record]]:
    """The records of every set; in `folder`, if given, those that are there already are not made again."""
    found: dict[str, list[Record]] = {}
    with reporter.stage("evaluate", sum(len(subject.items(s)) for s in sets)) as progress:
        for chosen in sets:
            if folder is None:
                found[chosen.name] = suite.collect(subject, chosen, progress=progress)
                continue
            file = RecordFile(folder, chosen.name)
            done = {record["row"] for record in file.records}
            suite.collect(subject, chosen, done, file.append, progress)
            found[chosen.name] = file.close()
    return found


def keep_hidden(subject: Subject, sets: Sequence[EvaluationSet], folder: Path) -> dict[str, Any]:
    """hidden.safetensors: mean hidden states of the first rows of the sets `forget` and `retain`, per layer.

    With an adapter, those without it as well. None of a model with an assistant, whose states are the base's own.
    """
    if isinstance(subject.model, Subtracted):
        return {}
    kept: dict[str, torch.Tensor] = {}
    for chosen in [s for s in sets if s.name in ("forget", "retain")]:
        found = items(subject, chosen.rows[:HIDDEN_ROWS], chosen.max_length)[:HIDDEN_ROWS]  # a text has many windows
        examples = [item.example for item in found]
        for name, context in _with_and_without(subject.model, chosen.name):
            with context:
                layers = layer_means(subject.model, examples, subject.token_budget)
            kept[name] = torch.from_numpy(np.stack(layers))
    if kept:
        about = {"shape": "(layers, rows, width)", "state": "mean over the positions that predict the answer"}
        artifacts.write_tensors(folder / HIDDEN, kept, about)
    return {name: tensor.numpy() for name, tensor in kept.items()}


def _with_and_without(model: Any, name: str) -> list[tuple[str, Any]]:
    adapter = getattr(model, "disable_adapter", None)
    return [(name, nullcontext()), *([(f"{name} original", adapter())] if adapter else [])]


def score_folder(path: Path, settings: ScoreSettings) -> dict[str, Score]:
    """Scores of an evaluation folder or of another program's log, without a model."""
    log = Path(settings.write_log) if settings.write_log else None
    if log:
        reads = [Path(read) for read in (path, settings.reference) if read]
        folders.check_new_file(log, "--write-log", settings.overwrite, reads)
    evaluation = open_evaluation(path)
    reference = open_evaluation(Path(settings.reference)) if settings.reference else None
    if reference:
        check_comparable(evaluation, reference)
    scores = SUITES[evaluation.about["suite"]].score(evaluation, reference)
    if log:
        write_log(log, evaluation, scores)
    return scores
