"""The loop: forget and retain rows in one forward pass, averages by global counts. Losses are functions."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint
from transformers import get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from .config import OptimizerSettings
from .data.examples import Example, collate, micro_batches
from .data.pairing import pairs
from .errors import NumericError, ResourceError, UsageError
from .forward import answer_hidden, answer_logits, answer_records, base_of
from .losses.forget import LossFunction, needs

# Our name -> transformers' name: its plain "constant" has no warm-up.
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Unit:
    """What must stay in one forward pass: the sequences of one row in one term (`forget`, `retain`, `learn`)."""

    term: str
    index: int
    sequences: tuple[Example, ...]

    @property
    def width(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))


Objective = Callable[[Any, Sequence[Unit]], Sums]


@dataclass
class ForgetObjective:
    """Forget and retain loss of a micro-batch, each summed over its examples.

    Of the original model, computed once because they never change: `constants`, summed NLLs in nats (forget rows,), and
    `retain_hidden`, final hidden states (answer tokens, hidden) per retain row. `retain_function` None: no retain rows.
    """

    forget: Sequence[Example]
    retain: Sequence[Example]
    refusals: Sequence[Example]
    forget_function: LossFunction
    retain_function: LossFunction | None
    constants: dict[str, Tensor] = field(default_factory=dict)
    retain_hidden: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = needs(self.forget_function)
        self.uses_original_logits = self.retain_function is not None and "original_logits" in needs(
            self.retain_function
        )

    def observe_original(self, model: Any, used_retain: Iterable[int], token_budget: int) -> None:
        """Take from the original model whatever the losses need of it. Call before the adapter is attached."""
        for name, examples in (("reference", self.forget), ("refusal_reference", self.refusals)):
            if name in self.inputs:
                records = answer_records(model, examples, token_budget)
                self.constants[name] = torch.tensor([r.nll for r in records])
        if self.uses_original_logits:
            rows = sorted(set(used_retain))
            for group in micro_batches([len(self.retain[i]) for i in rows], token_budget):
                chosen = [self.retain[rows[g]] for g in group]
                hidden = answer_hidden(model, collate(chosen).to(base_of(model).device)).cpu()
                parts = hidden.split([e.answer_length for e in chosen])
                self.retain_hidden |= {rows[g]: part.clone() for g, part in zip(group, parts, strict=True)}

    def unit(self, term: str, index: int) -> Unit:
        if term == "retain":
            return Unit(term, index, (self.retain[index],))
        sources = {"answers": self.forget, "refusals": self.refusals}
        return Unit(term, index, tuple(sources[name][index] for name in self.inputs if name in sources))

    def step(self, chosen: Iterable[tuple[int, int]]) -> list[Unit]:
        """The units of one step from its (forget row, retain row) pairs."""
        chosen = list(chosen)
        units = [self.unit("forget", f) for f, _ in chosen]
        return units + [self.unit("retain", r) for _, r in chosen if self.retain_function is not None]

    def __call__(self, model: Any, units: Sequence[Unit]) -> Sums:
        forget = [u for u in units if u.term == "forget"]
        retain = [u for u in units if u.term == "retain"]
        columns = len(forget[0].sequences) if forget else 0
        examples = [u.sequences[c] for c in range(columns) for u in forget] + [u.sequences[0] for u in retain]
        device = base_of(model).device
        hidden = None
        if retain and self.uses_original_logits:
            hidden = torch.cat([self.retain_hidden[u.index] for u in retain]).to(device)
        answers, original = answer_logits(model, collate(examples).to(device), hidden)
        *blocks, kept = answers.split([len(forget)] * columns + [len(retain)])
        sums: Sums = {}
        if forget:
            index = torch.tensor([u.index for u in forget])
            given = {name: values[index].to(device) for name, values in self.constants.items()}
            sequences = iter(blocks)
            given |= {name: next(sequences) for name in self.inputs if name in ("answers", "refusals")}
            sums["forget"] = self.forget_function(**given).sum()
        if retain and self.retain_function is not None:
            extra = {"original_logits": original} if self.uses_original_logits else {}
            sums["retain"] = self.retain_function(kept, **extra).sum()
        return sums


def forget_steps(
    objective: ForgetObjective, *, epochs: int, batch_size: int, pairing: str, seed: int
) -> Iterator[list[Unit]]:
    """The units of every step of the run, in an order that depends on the seed alone."""
    groups = [[e.group for e in examples] for examples in (objective.forget, objective.retain)]
    for epoch in range(epochs):
        order = pairs(*groups, epoch=epoch, seed=seed, mode=pairing)
        for start in range(0, len(order), batch_size):
            yield objective.step(order[start : start + batch_size])


def learn(model: Any, units: Sequence[Unit]) -> Sums:
    """The objective of fine-tuning: NLL per answer token, summed over examples."""
    batch = collate([u.sequences[0] for u in units]).to(base_of(model).device)
    return {"learn": answer_logits(model, batch)[0].nll_mean.sum()}


def learn_steps(examples: Sequence[Example], *, epochs: int, batch_size: int, seed: int) -> Iterator[list[Unit]]:
    """Every example once per epoch, in a seeded order."""
    groups = [None] * len(examples)
    for epoch in range(epochs):
        order = [i for i, _ in pairs(groups, groups, epoch=epoch, seed=seed, mode="random")]
        for start in range(0, len(order), batch_size):
            yield [Unit("learn", i, (examples[i],)) for i in order[start : start + batch_size]]


def fit(
    model: nn.Module,
    steps: Sequence[list[Unit]],
    objective: Objective,
    settings: OptimizerSettings,
    *,
    token_budget: int,
    term_weights: Mapping[str, float] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Train whatever parameters of `model` require a gradient, in place.

    The loss of a step is the sum over terms of weight x (sum over its examples / number of its examples in the *whole*
    step), so cutting a step into other micro-batches changes nothing but the order of summation. `penalty` is added
    once per step. `on_step` gets one record per step. Raises NumericError at the first non-finite value, before the
    optimizer uses it. The model is in evaluation mode throughout and afterwards, because dropout in the base would make
    the start differ from the original model.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # The model stays where it is. Naming a device here would fix it for the whole process, in accelerate's own state.
    accelerator = Accelerator(device_placement=False)
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    warmup = round(settings.warmup * len(steps))
    scheduler = get_scheduler(SCHEDULES[settings.schedule], optimizer, warmup, len(steps))
    model.eval()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    with _checkpointed(base_of(model)) if settings.gradient_checkpointing else nullcontext():
        for number, step in enumerate(steps, start=1):
            began = time.perf_counter()
            try:
                means = _backward(accelerator, partial(objective, wrapped), step, token_budget, term_weights or {})
                if penalty:
                    means["penalty"] = penalty()
                    accelerator.backward(means["penalty"])
                losses = {name: value.item() for name, value in means.items()}
                norm = _finite_norm(number, losses, parameters)
                clip_grads_with_norm_(parameters.values(), settings.max_grad_norm, norm)
                rate = scheduler.get_last_lr()[0]
                optimizer.step()
            except torch.OutOfMemoryError as error:
                raise ResourceError(_out_of_memory(number, token_budget)) from error
            scheduler.step()
            optimizer.zero_grad()
            if on_step:
                tokens = sum(len(e) for unit in step for e in unit.sequences)
                spent = {"grad_norm": norm.item(), "tokens": tokens, "seconds": time.perf_counter() - began}
                on_step({"step": number, "lr": rate, **losses, **spent})


def _backward(
    accelerator: Accelerator,
    objective: Callable[[Sequence[Unit]], Sums],
    step: Sequence[Unit],
    token_budget: int,
    term_weights: Mapping[str, float],
) -> Sums:
    """Add the gradient of one step's loss, micro-batch by micro-batch; the mean of every term over the whole step."""
    counts = Counter(unit.term for unit in step)
    rows = max(len(unit.sequences) for unit in step)
    means: Sums = {}
    for group in micro_batches([unit.width for unit in step], token_budget // rows):
        sums = objective([step[i] for i in group])
        terms = {name: value / counts[name] for name, value in sums.items()}
        accelerator.backward(torch.stack([term_weights.get(name, 1.0) * value for name, value in terms.items()]).sum())
        for name, value in terms.items():
            means[name] = means.get(name, 0) + value.detach()
    return means


def _finite_norm(step: int, losses: Mapping[str, float], parameters: Mapping[str, Tensor]) -> Tensor:
    """Norm of the whole gradient. Raises NumericError naming the term or the parameter that is not finite.

    To be called before clipping, which would spread one NaN over every gradient.
    """
    for name, value in losses.items():
        if not math.isfinite(value):
            raise NumericError(
                f"train: the {name} loss is {value} at step {step}. Nothing was written; try a lower --lr."
            )
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    norm = get_total_norm(gradients.values())
    if not torch.isfinite(norm):
        bad = next((name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()), "all together")
        raise NumericError(f"train: the gradient of {bad} is not finite at step {step}. Nothing was written.")
    return norm


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Within the context, the backward pass recomputes each layer's activations.

    transformers' own switch works in training mode only, where the base's dropout would be active.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UsageError(f"--gradient-checkpointing: {type(model).__name__} does not support it.")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _out_of_memory(step: int, token_budget: int) -> str:
    return (
        f"train: out of memory at step {step} with --tokens-per-batch {token_budget}. Halve it (the result stays the "
        "same), or add --gradient-checkpointing true."
    )


def retain_penalty(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """ReGLU's regulariser .5 sum over sites ||B^T P||_F^2; each pair is a site's trainable B (out, r) and P (out, k).

    It keeps what the adapter writes out of the directions P that retain outputs use. Paper: arXiv 2604.17396.
    """
    return 0.5 * torch.stack([(b.T @ p).square().sum() for b, p in pairs]).sum()
