"""`lorasure finetune`: make a target, or the retrained reference, from a model and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import artifacts, lora
from .config import FinetuneSettings
from .data.load import load_data
from .init.apply import INITS, Evidence, Request, initialise
from .models import load_model, load_tokenizer, pick_device, pick_dtype, pick_token_budget
from .progress import Reporter
from .registry import lookup
from .sites import find_sites
from .stages import logged_fit
from .train import SCHEDULES, learn, learn_steps
from .workbench import check_template


def finetune(settings: FinetuneSettings, reporter: Reporter | None = None) -> Path:
    """Learn the rows, with all weights or with LoRA, and save a whole model, its tokenizer and the account in `out`."""
    reporter = reporter or Reporter(quiet=True)
    out = Path(settings.out)
    artifacts.check_new(out, settings.overwrite)
    lookup(SCHEDULES, settings.schedule, "--schedule")
    check_template(settings.template)
    device = pick_device(settings.device)
    # Small updates vanish in half-precision weights, so training all of them is float32 unless the user says otherwise.
    whole = settings.rank is None and settings.dtype == "auto"
    dtype = pick_dtype("float32" if whole else settings.dtype, device)
    with reporter.held():
        tokenizer = load_tokenizer(settings.model, settings.revision)
        with reporter.stage("read data"):
            data = load_data(settings.data, settings, tokenizer)
        for line in data.notes("data"):
            reporter.note(line)
        with reporter.stage("load model"):
            model = load_model(settings.model, dtype=dtype, device=device, revision=settings.revision)
            trained = _trainable(model, settings)
    steps = list(learn_steps(data.examples, epochs=settings.epochs, batch_size=settings.batch_size, seed=settings.seed))
    budget = pick_token_budget(settings.tokens_per_batch, device)
    with artifacts.new_folder(out, settings.overwrite) as folder:
        artifacts.write_yaml(folder / artifacts.CONFIG, settings.located())
        artifacts.write_json(folder / artifacts.DATA, {"data": data.about()})
        logged_fit(folder, reporter, trained, steps, learn, settings, token_budget=budget)
        with reporter.stage("save"):
            saved = lora.merge(trained) if settings.rank else trained
            saved.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return out


def _trainable(model: Any, settings: FinetuneSettings) -> Any:
    """All weights, or the model with a plain LoRA adapter of --rank."""
    if settings.rank is None:
        return model.requires_grad_(True)
    sites = find_sites(model)
    request = Request(settings.rank, settings.alpha / settings.rank, seed=settings.seed)
    factors, _ = initialise(model, sites, INITS["lora"], lambda _: Evidence(), request, None)
    return lora.attach(model, factors, settings.rank, settings.alpha, compensate=False)
