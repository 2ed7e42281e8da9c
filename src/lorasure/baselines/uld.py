"""ULD (arXiv 2406.08607): an assistant learns the forget set and to know nothing else; its logits are subtracted."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from .. import lora
from ..check import answers_of, check_export, states_of
from ..checkpoint import Keeper, remove_checkpoints
from ..errors import UsageError
from ..init.apply import INITS, Evidence, initialise
from ..losses.retain import nll
from ..losses.tokens import Answers
from ..objective import ForgetObjective, ForgetSteps
from ..outcome import ASSISTANT
from ..stages import CHECKED_ROWS
from ..train_stage import logged_fit
from ..workbench import Workbench
from .common import score
from .settings import UldSettings
from .subtracted import Subtracted, first_layers, load_assistant, save_assistant


def uniform(answers: Answers) -> torch.Tensor:
    """Cross-entropy of p to the uniform distribution in nats, mean over tokens, (count,); ln V at least, if uniform."""
    return answers.mean(answers.per_token(lambda logits, _: logits.logsumexp(-1) - logits.mean(-1)))


def make(bench: Workbench, settings: UldSettings, run: Path) -> None:
    """Train the assistant: NLL on forget rows + lambda x `uniform` on retain rows; write it to assistant/."""
    count = bench.model.config.get_text_config().num_hidden_layers
    layers = settings.layers or max(1, count // 4)
    if layers > count:
        raise UsageError(f"--layers must be in [1, {count}], the model's, got {layers}.")
    assistant = first_layers(bench.model, layers)
    modules = {name for name, _ in assistant.named_modules()}
    sites = [site for site in bench.sites if site.module in modules]
    if not sites:
        raise UsageError(f"--targets and --exclude leave no layer to adapt among the first {layers}.")
    factors, _ = initialise(assistant, sites, INITS["lora"], lambda _: Evidence(), bench.request, None)
    wrapped = lora.attach(assistant, factors, settings.rank, settings.alpha, compensate=False)
    train(bench, settings, run, wrapped)
    expected = Subtracted(bench.model, lora.bake(wrapped), settings.weight)
    probes = [e for part in bench.data for e in part.examples[:CHECKED_ROWS]]
    states = states_of(expected, probes)
    folder = run / ASSISTANT
    shutil.rmtree(folder, ignore_errors=True)
    save_assistant(expected, folder, bench.fingerprint)
    del expected, wrapped, assistant
    bench.release_model()
    fresh = load_assistant(bench.fresh_model(), folder)
    check_export(states, answers_of(fresh, probes), bench.dtype)
    score(bench, run, fresh)
    remove_checkpoints(run)


def train(bench: Workbench, settings: UldSettings, run: Path, assistant: lora.PeftModel) -> None:
    """The assistant's own training, in place -> train.jsonl."""
    forget, retain = (part.examples for part in bench.data)
    objective = ForgetObjective(forget, retain, (), nll, uniform)
    order = {"epochs": settings.epochs, "batch_size": settings.batch_size, "seed": settings.seed}
    steps = ForgetSteps(objective, **order, pairing="random")
    keeper = Keeper(run, settings.checkpoint_every, bench.reporter.note)
    options = {"token_budget": bench.token_budget, "term_weights": {"retain": settings.lambda_}}
    logged_fit(keeper, bench.reporter, assistant, steps, objective, settings, **options, on_guard=bench.fired)
