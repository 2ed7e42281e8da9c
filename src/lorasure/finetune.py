"""`lorasure finetune`: make a target, or the retrained reference, from a model and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import artifacts, lora
from .config import FinetuneSettings
from .data.load import load_data
from .init.apply import INITS, Request, check_rank, initialise
from .models import load_model, load_tokenizer, pick_device, pick_dtype, pick_token_budget
from .progress import Reporter
from .registry import lookup
from .sites import find_sites
from .train import SCHEDULES, fit, learn, learn_steps


def finetune(settings: FinetuneSettings, reporter: Reporter | None = None) -> Path:
    """Make a target (or a retrained reference): learn the rows, all weights or LoRA, and save a whole model in `out`."""
    reporter = reporter or Reporter(quiet=True)
    out = Path(settings.out)
    artifacts.check_new(out, settings.overwrite)
    lookup(dict.fromkeys(SCHEDULES), settings.schedule, "--schedule")
    device = pick_device(settings.device)
    tokenizer = load_tokenizer(settings.model, settings.revision)
    with reporter.stage("read data"):
        data = load_data(settings.data, settings, tokenizer)
    for line in data.notes("data"):
        reporter.note(line)
    with reporter.stage("load model"):
        model: Any = load_model(
            settings.model, dtype=pick_dtype(settings.dtype, device), device=device, revision=settings.revision
        )
    if settings.rank:
        sites = find_sites(model)
        check_rank(sites, settings.rank)
        request = Request(settings.rank, settings.alpha / settings.rank, seed=settings.seed)
        factors, _ = initialise(model, sites, INITS["lora"], {}, request, None)
        model = lora.attach(model, factors, settings.rank, settings.alpha, compensate=False)
    else:
        model.requires_grad_(True)
    steps = list(learn_steps(data.examples, epochs=settings.epochs, batch_size=settings.batch_size, seed=settings.seed))
    with reporter.stage("train", len(steps), "steps") as progress:
        fit(model, steps, learn, settings, token_budget=pick_token_budget(settings.tokens_per_batch, device), on_step=lambda _: progress(1))
    with artifacts.new_folder(out, settings.overwrite) as folder:
        saved = lora.merge(model) if settings.rank else model
        saved.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out
