"""`--lr auto`: a few steps at a growing learning rate show how far the adapter must travel; the run's rate follows.

With Adam every parameter moves by about the learning rate in a step, so what a run changes depends on the distance that
its schedule travels, the sum of the rates of its steps, whatever the size of the model and the number of the steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from .config import ForgetSettings, OptimizerSettings
from .errors import NumericError
from .objective import ForgetObjective, ForgetSteps, Unit
from .schedule import rate_shares
from .train import fit

FIRST, GROWTH, STEPS = 1e-5, 1.5, 26  # the ramp's learning rates: FIRST x GROWTH^k, k < STEPS, so .25 at the most
ROWS = 8  # forget rows in a step of the ramp; as many retain rows come with them
SEEN = 16  # forget rows that are watched
# Distance of a run, in those after which half is forgotten. Measured on models of 64 to 256 wide and of 5, 25, 65 and
# 100 steps (docs/log.md): with ihl the best rates travel 1.5 to 4 times as far, whatever the start.
TRAVEL = 2.5
# The same in distances of the whole ramp, where half never was: it ends far beyond what a run survives. Of seven runs
# on text that a model 64 wide did not know, five broke or lost what was to stay when they went as far, none at a tenth.
GUESS = 0.1


@dataclass
class Ramp:
    """`distances` travelled, and what is `known` of the watched rows (in [0, 1]) there; the first is the start."""

    distances: list[float] = field(default_factory=list)
    known: list[float] = field(default_factory=list)

    def add(self, rate: float, known: float) -> None:
        """A step at this rate, and what is known after it."""
        self.distances.append((self.distances[-1] if self.distances else 0.0) + rate)
        self.known.append(known)

    @property
    def over(self) -> bool:
        """Whether half is forgotten."""
        return self.known[-1] <= self.known[0] / 2

    @property
    def distance(self) -> float:
        """Where half was forgotten, between two steps in proportion, the distance on a logarithmic scale.

        All of the distance if it never was: the ramp has ended at its last step, or before the model broke.
        """
        if not self.over or len(self.known) < 3:
            return self.distances[-1]
        (a, b), (x, y) = self.known[-2:], map(math.log, self.distances[-2:])
        return math.exp(x + (y - x) * (a - self.known[0] / 2) / (a - b))


def calibrate(
    model: nn.Module, objective: ForgetObjective, settings: ForgetSettings, steps: int, known: Any, **options: Any
) -> dict[str, float]:
    """The learning rate for a run of so many steps, and of the ramp: distance, steps, whether half was forgotten.

    Deterministic. The model is afterwards what it was, bit for bit. `known(rows)`: what the model knows of some forget
    rows, given by their indices, in [0, 1]. `options`: of `train.fit`.
    """
    watched = range(0, len(objective.forget), math.ceil(len(objective.forget) / SEEN))
    found = climb(model, forget_ramp(objective, settings), objective, settings, lambda: known(watched), **options)
    rate = rate_for(found, settings, steps)
    return {"rate": rate, "distance": found.distance, "steps": len(found.known) - 1, "half_forgotten": found.over}


def forget_ramp(objective: ForgetObjective, settings: ForgetSettings) -> list[list[Unit]]:
    """The ramp's steps: the run's own rows in its own order, a few at a time."""
    size = min(settings.batch_size, ROWS)
    options = {"epochs": settings.epochs, "pairing": settings.pairing, "seed": settings.seed}
    return list(islice(cycle(ForgetSteps(objective, batch_size=size, **options)), STEPS))


def climb(
    model: nn.Module,
    ramp: Sequence[list[Unit]],
    objective: Any,
    settings: OptimizerSettings,
    known: Callable[[], float],
    **options: Any,
) -> Ramp:
    """Train at a growing rate until half is forgotten or the model breaks; then all is as it was, bit for bit."""
    found = Ramp()
    found.add(0.0, known())

    def after(record: dict[str, Any]) -> bool:
        found.add(record["lr"], known())
        return found.over

    with _undone(model):
        try:
            options |= {"on_step": after, "shares": lambda step: GROWTH**step}
            fit(model, ramp, objective, replace(settings, lr=FIRST), **options)
        except NumericError:  # the retain loss explodes, or a value is not finite: no farther than this
            pass
    return found


def rate_for(ramp: Ramp, settings: OptimizerSettings, steps: int) -> float:
    """The learning rate with which the run's schedule travels TRAVEL times as far as where half was forgotten.

    If it never was, GUESS times as far as the ramp went.
    """
    shares = rate_shares(settings, steps)
    return ramp.distance * (TRAVEL if ramp.over else GUESS) / sum(shares(step) for step in range(steps))


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """After the block the trained parameters, their gradients and the random states are what they were."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    before, state = [p.detach().clone() for p in parameters], random.getstate()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(state)
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
                p.grad = None
