"""Learning rate schedules: what share of the rate each step takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import get_scheduler

from .config import OptimizerSettings

# Our name -> transformers' name: its plain "constant" has no warm-up.
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def rate_shares(settings: OptimizerSettings, steps: int) -> Callable[[int], float]:
    """The schedule of a run of so many steps: step, from 0 -> its share of the learning rate.

    The last step takes no part in the warm-up, which begins at 0: one that is all of a run would train nothing.
    """
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # transformers hands out its rules with an optimizer only
    warming = min(round(settings.warmup * steps), steps - 1)
    scheduler: Any = get_scheduler(SCHEDULES[settings.schedule], unused, warming, steps)
    return scheduler.lr_lambdas[0]
