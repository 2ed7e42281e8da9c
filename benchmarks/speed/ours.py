"""How this library works, by its public functions; and `bare`, the limit that arithmetic sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from workload import EPOCHS, Setting, with_lora

from lorasure import lora
from lorasure.config import OptimizerSettings
from lorasure.data.examples import Example, collate, micro_batches
from lorasure.importance.measure import Importance, measure
from lorasure.init.apply import INITS, Evidence, Request
from lorasure.init.apply import initialise as initialise_sites
from lorasure.init.low_rank import Factors
from lorasure.losses.forget import FORGET_LOSSES, bind
from lorasure.losses.retain import RETAIN_LOSSES
from lorasure.losses.tokens import shift
from lorasure.models import pick_token_budget
from lorasure.objective import ForgetObjective, ForgetSteps, Unit
from lorasure.prefix import find_prefix, tokens_per_pass
from lorasure.sites import Site
from lorasure.train import fit

BUDGET = pick_token_budget(None, torch.device("cpu"))


def importance(
    model: PreTrainedModel,
    sites: Sequence[Site],
    forget: Sequence[Example],
    retain: Sequence[Example],
    setting: Setting,
    *,
    space: str = "lora",
) -> Importance:
    """One pass, exact moments of per-example gradients."""
    score = "fisher" if space == "full" else "variance"
    return measure(model, sites, forget, retain, score=score, probe=setting.probe(space), token_budget=BUDGET)


def initialise(
    model: PreTrainedModel, sites: Sequence[Site], found: Importance, setting: Setting
) -> dict[Site, Factors]:
    """VILA's start."""
    request = Request(setting.rank, setting.scaling, seed=setting.seed)
    return initialise_sites(model, sites, INITS["vila"], lambda s: Evidence(found.weights(s)), request, None)[0]


def observed(
    model: PreTrainedModel,
    sites: Iterable[Site],
    forget: Sequence[Example],
    retain: Sequence[Example],
    loss: str,
    setting: Setting,
) -> ForgetObjective:
    """The objective with what it needs of the original model: once per run, whatever the number of epochs."""
    settings = {"beta": setting.beta if loss == "npo" else None}
    function = bind(loss, FORGET_LOSSES[loss].function, settings)
    objective = ForgetObjective(forget, retain, (), function, RETAIN_LOSSES["nll"].function)
    objective.prefix = find_prefix(model, sites, [*forget, *retain], BUDGET, print)
    objective.observe_original(model, range(len(retain)), BUDGET)
    return objective


def epoch(objective: ForgetObjective, setting: Setting) -> ForgetSteps:
    """The steps of the first epoch: its rows meet in the order of `cases.order_of`."""
    return ForgetSteps(objective, epochs=1, batch_size=setting.batch_size, pairing="random", seed=setting.seed)


def train(
    model: PreTrainedModel,
    start: dict[Site, Factors],
    objective: ForgetObjective,
    steps: Sequence[list[Unit]],
    setting: Setting,
    *,
    budget: int | None = None,
    on_step=None,
) -> None:
    """One pass over `steps`. `on_step`: as in `theirs.train`."""
    budget = budget or tokens_per_pass(BUDGET, objective.prefix.skipped if objective.prefix else 0)
    wrapped = lora.attach(model, start, setting.rank, setting.alpha, compensate=True)
    optimizer = OptimizerSettings(lr=setting.lr, epochs=EPOCHS, batch_size=setting.batch_size, max_grad_growth=1e9)
    tell = partial(_told, wrapped=wrapped, on_step=on_step) if on_step else None
    fit(wrapped, steps, objective, optimizer, token_budget=budget, term_weights={"retain": setting.lam}, on_step=tell)


def _told(record, wrapped, on_step) -> None:
    on_step({name: record[name] for name in ("forget", "retain", "grad_norm")}, wrapped)


def bare_batches(forget: Sequence[Example], retain: Sequence[Example]) -> list[tuple]:
    """Padded batches of rows of like length, with the places and the tokens of the answers, ready before the clock."""
    examples = [*forget, *retain]
    found = []
    for group in micro_batches([len(e) for e in examples], BUDGET):
        batch = collate([examples[i] for i in group])
        found.append((batch.inputs, *shift(batch.labels)))
    return found


def bare_model(model: PreTrainedModel, start: dict[Site, Factors], setting: Setting):
    """The model with the same factors to train, by peft alone."""
    return with_lora(model, start, setting, residual=False)


def bare(model, batches: Sequence[tuple]) -> None:
    """Forward and backward of the mean NLL of answer tokens: no second pass, no optimizer, no moments."""
    base = model.get_base_model()
    for inputs, mask, targets in batches:
        hidden = base.model(**inputs, use_cache=False).last_hidden_state[mask]
        cross_entropy(base.lm_head(hidden), targets).backward()
