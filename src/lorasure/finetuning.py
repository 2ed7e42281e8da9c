"""`lorasure finetune`: make a target, or the retrained reference, from a model and rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from . import artifacts, folders, lora
from .checkpoint import Keeper, remove_checkpoints
from .config import PER_CALL, FinetuneSettings
from .data.load import load_data
from .errors import UsageError
from .identity import allowed_changes, identity
from .init.apply import INITS, Evidence, Request, initialise
from .memory import note_guard
from .models import dtype_name, fingerprint, load_model, load_tokenizer, pick_device, pick_dtype, pick_token_budget
from .objective import learn, learn_steps
from .progress import Reporter
from .registry import lookup
from .schedule import SCHEDULES
from .sites import all_sites
from .train_stage import logged_fit
from .workbench import check_template
from .yaml_file import write_yaml


def finetune(settings: FinetuneSettings, reporter: Reporter | None = None) -> Path:
    """Learn the rows, with all weights or with LoRA, and save a whole model, its tokenizer and the account in `out`."""
    reporter = reporter or Reporter(quiet=True)
    out = Path(settings.out)
    folders.check_new(out, settings.overwrite, settings.resume, folders.read_by(settings), artifacts.FINETUNED)
    lookup(SCHEDULES, settings.schedule, "--schedule")
    check_template(settings.template)
    if settings.quantize:
        raise UsageError(
            f"finetune writes whole weights, which a base in 4 bits (--quantize {settings.quantize}) lost."
        )
    device = pick_device(settings.device)
    # Small updates vanish in half-precision weights, so training all of them is float32 unless the user says otherwise.
    whole = settings.rank is None and settings.dtype == "auto"
    dtype = pick_dtype("float32" if whole else settings.dtype, device)
    with reporter.held():
        tokenizer = load_tokenizer(settings.model, settings.revision, allow_pickle=settings.allow_pickle)
        with reporter.stage("read data"):
            data = load_data(settings.data, settings, tokenizer)
        for line in data.notes("data"):
            reporter.note(line)
        with reporter.stage("load model"):
            options = {"revision": settings.revision, "allow_pickle": settings.allow_pickle}
            model = load_model(settings.model, dtype=dtype, device=device, **options)
            trained = trainable(model, settings.rank, settings.alpha, settings.seed)
    steps = list(learn_steps(data.examples, epochs=settings.epochs, batch_size=settings.batch_size, seed=settings.seed))
    budget = pick_token_budget(settings.tokens_per_batch, device)
    about = data.about()
    base = fingerprint(model, settings.model)
    own = identity(replace(settings, dtype=dtype_name(dtype)), {"data": data}, base)
    options = {"resume": settings.resume, "overwrite": settings.overwrite, "note": reporter.note}
    with folders.resumable_folder(out, own, allow_change=allowed_changes(settings), **options) as folder:
        kept = {name: value for name, value in settings.located().items() if name not in PER_CALL}
        write_yaml(folder / artifacts.CONFIG, kept)
        artifacts.write_json(folder / artifacts.DATA, {"data": about})
        account = folder / artifacts.FINETUNED
        with artifacts.as_written(account):
            guards = list(artifacts.read_json(account)["guards"]) if account.is_file() else []
        artifacts.write_json(account, {"kind": "finetune", "base": base, "settings": kept, "guards": guards})
        keeper = Keeper(folder, settings.checkpoint_every, reporter.note)
        options = {"token_budget": budget, "on_guard": partial(note_guard, reporter, account)}
        logged_fit(keeper, reporter, trained, steps, learn, settings, **options)
        with reporter.stage("save"):
            saved = lora.merge(trained) if settings.rank else trained
            saved.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        more = {"steps": len(steps), "resumed_after": keeper.continued, "versions": artifacts.versions()}
        artifacts.write_json(account, artifacts.read_json(account) | more)
        remove_checkpoints(folder)
    return out


def trainable(model: Any, rank: int | None, alpha: float, seed: int) -> Any:
    """The model ready to be trained: all its weights, or a plain LoRA adapter of rank `rank` on all layers that fit."""
    if rank is None:
        return model.requires_grad_(True)
    sites = all_sites(model)
    unfit = set(lora.unfit_sites(model, sites))
    sites = [site for site in sites if site not in unfit]
    request = Request(rank, alpha / rank, seed=seed)
    factors, _ = initialise(model, sites, INITS["lora"], lambda _: Evidence(), request, None)
    return lora.attach(model, factors, rank, alpha, compensate=False)
