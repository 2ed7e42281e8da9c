"""The loop: forget and retain rows in one forward pass, averages by global counts. Losses are functions."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from . import processes
from .config import OptimizerSettings
from .data.examples import micro_batches
from .errors import NumericError, ResourceError
from .forward import base_of
from .interrupt import finishing_first
from .layers import checkpointed, compiled
from .memory import Fired, is_out_of_memory, within_memory
from .objective import Objective, Sums, Unit
from .schedule import rate_shares

if TYPE_CHECKING:
    from .checkpoint import Keeper

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter
# The loss is multiplied by it where the base computes in float16, whose smallest numbers lose digits and then vanish.
# Gradients of rows that are known well are as small: 2^8 is enough at an NLL of 2e-4. A power of two is exact.
SCALE = 2.0**10


@dataclass
class Training:
    """Everything that a step changes, so everything that a checkpoint holds.

    `done`: steps taken. `token_budget` shrinks when memory runs out. `first` and `largest`: the losses of the first
    step and the largest gradient norm of any, which later ones are compared with. `best`: see `Keeper`. `scale`: SCALE
    or 1, by the base.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    scheduler: Any
    token_budget: int
    scale: float
    done: int = 0
    first: dict[str, float] = field(default_factory=dict)
    largest: float = 0.0
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        settings: OptimizerSettings,
        steps: int,
        token_budget: int,
        shares: Callable[[int], float] | None = None,
    ) -> Training:
        """At step 0, for all parameters that require a gradient. `shares`: see `fit`."""
        assert not isinstance(settings.lr, str), "auto has become a number before training"
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # On a GPU in one launch: step by step it takes as long as a tenth of a 7B model's pass.
        fused = any(p.is_cuda for p in parameters.values()) or None
        decay = settings.weight_decay
        optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, weight_decay=decay, fused=fused)
        scheduler = LambdaLR(optimizer, shares or rate_shares(settings, steps))
        scale = SCALE if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0
        return cls(parameters, optimizer, scheduler, token_budget, scale)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, the optimizer's moments, the best parameters so far and the random states, by name."""
        found = {f"parameter|{name}": p for name, p in self.parameters.items()}
        found |= {f"best|{name}": p for name, p in self.best.items()}
        for name, p in self.parameters.items():  # one that never had a gradient has no state
            found |= {f"{moment}|{name}": t for moment, t in self.optimizer.state.get(p, {}).items()}
        found["random|cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            found |= {f"random|cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        return found

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, as JSON. No learning rates: they follow from the settings and the step."""
        state = random.getstate()
        kept = {"done": self.done, "token_budget": self.token_budget, "first": self.first, "largest": self.largest}
        return kept | {"random": [state[0], list(state[1]), state[2]]}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Become what `tensors` and `numbers` were taken from.

        If they are of another training: KeyError, RuntimeError, TypeError or ValueError, and no parameter has changed.
        """
        done, token_budget = int(numbers["done"]), int(numbers["token_budget"])
        first, largest = dict(numbers["first"]), float(numbers["largest"])
        version, values, gauss = numbers["random"]
        random.setstate((version, tuple(values), gauss))
        torch.set_rng_state(tensors["random|cpu"])
        for i in range(torch.cuda.device_count()):  # those that are here and were there
            if (key := f"random|cuda:{i}") in tensors:
                torch.cuda.set_rng_state(tensors[key], i)
        for name, p in self.parameters.items():
            if tensors[f"parameter|{name}"].shape != p.shape:
                raise ValueError(f"{name} has another shape")
        fused = self.optimizer.defaults["fused"]  # it has its count of steps on the device
        for name, p in self.parameters.items():
            p.copy_(tensors[f"parameter|{name}"])
            stored = {moment: tensors[f"{moment}|{name}"] for moment in MOMENTS if f"{moment}|{name}" in tensors}
            if stored:
                placed = {m: t if m == "step" and not fused else t.to(p.device) for m, t in stored.items()}
                self.optimizer.state[p] = placed
        self.best = {key.removeprefix("best|"): t for key, t in tensors.items() if key.startswith("best|")}
        self.done, self.token_budget, self.first, self.largest = done, token_budget, first, largest
        rules = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        rates = [base * rule(done) for base, rule in rules]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        place = {"last_epoch": done, "_step_count": done + 1, "_last_lr": rates}
        self.scheduler.load_state_dict(self.scheduler.state_dict() | place)


def fit(
    model: nn.Module,
    steps: Sequence[list[Unit]],
    objective: Objective,
    settings: OptimizerSettings,
    *,
    token_budget: int,
    term_weights: Mapping[str, float] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    ceilings: Mapping[str, float] | None = None,
    on_step: Callable[[dict[str, Any]], bool | None] | None = None,
    on_guard: Fired | None = None,
    keeper: Keeper | None = None,
    shares: Callable[[int], float] | None = None,
) -> None:
    """Train whatever parameters of `model` require a gradient, in place.

    The loss of a step is the sum over terms of weight x (sum over its examples / number of its examples in the *whole*
    step), so cutting a step into other micro-batches changes nothing but the order of summation; that is also done when
    memory runs out, and `on_guard` is told. `penalty` is added once per step. `on_step` gets one record per step; true
    ends the training. `shares`: of the learning rate that each step takes (default: `rate_shares`). `keeper` continues
    from its newest checkpoint and writes new ones. The first SIGTERM or SIGINT is raised after the step, once that is
    kept. Raises NumericError at the first non-finite value, before the optimizer uses it, and when the run diverges: a
    term above its ceiling in `ceilings`, or a gradient norm `max_grad_growth` times the largest so far. The model is in
    evaluation mode throughout and afterwards, because dropout in the base would make the start differ from the original
    model.
    """
    training = Training.begin(model, settings, len(steps), token_budget, shares)
    model.eval()
    step_of = partial(_step, training, partial(objective, model), settings)
    step_of = partial(step_of, term_weights or {}, penalty, ceilings or {}, on_guard or (lambda _: None))
    with (
        compiled(base_of(model)) if settings.compile else nullcontext(),
        checkpointed(base_of(model), settings.gradient_checkpointing),
        finishing_first() as asked,
    ):
        if keeper:
            keeper.begin(training)
        for number in range(training.done, len(steps)):
            record = step_of(steps[number])
            over = on_step and on_step(record)
            if keeper:
                keeper.after_step(training, record)
            stop = asked()  # once, after all that takes long: what is raised is what the step was kept for
            if keeper and (stop or keeper.due(training.done)):
                keeper.save(training)
            if stop:
                raise stop
            if over:
                break
        if keeper:
            keeper.finish(training)
    training.optimizer.zero_grad()


def _step(
    training: Training,
    objective: Callable[[Sequence[Unit]], Sums],
    settings: OptimizerSettings,
    term_weights: Mapping[str, float],
    penalty: Callable[[], Tensor] | None,
    ceilings: Mapping[str, float],
    fired: Fired,
    step: Sequence[Unit],
) -> dict[str, Any]:
    """One step of the optimizer; its record."""
    began, number = time.perf_counter(), training.done + 1
    rows = max(len(unit.sequences) for unit in step)
    lengths, scale = [unit.width * rows for unit in step], training.scale

    def attempt(token_budget: int) -> Sums:
        training.optimizer.zero_grad()  # all that an attempt before this one has changed
        groups = processes.share(micro_batches(lengths, token_budget))
        return _backward(objective, step, groups, term_weights, scale)

    where, parameters = f"train, step {number}", list(training.parameters.values())
    while True:
        means, training.token_budget = within_memory(attempt, training.token_budget, lengths, where, fired)
        means = _add_up(means, parameters, {unit.term for unit in step})
        scaled = [p.grad.div_(scale) for p in parameters if scale > 1 and p.grad is not None]
        if torch.isfinite(get_total_norm(scaled)):
            break
        scale = 1.0  # once more without: large gradients overflow with it, in every process alike
    if penalty:  # of the weights alone, so it is the same in every process
        means["penalty"] = penalty()
        means["penalty"].backward()
    losses = {name: value.item() for name, value in means.items()}
    norm = _finite_norm(number, losses, training.parameters)
    training.first = training.first or losses
    _check_divergence(losses, float(norm), training, ceilings, settings)
    clip_grads_with_norm_(training.parameters.values(), settings.max_grad_norm, norm)
    rate = training.scheduler.get_last_lr()[0]
    try:
        training.optimizer.step()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:  # half the weights may have moved: no retry
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"{where}: out of memory in the optimizer. Take a smaller --rank or --dtype.") from error
    training.scheduler.step()
    training.done, training.largest = number, max(training.largest, float(norm))
    tokens = sum(len(e) for unit in step for e in unit.sequences)
    spent = {"grad_norm": norm.item(), "tokens": tokens, "seconds": time.perf_counter() - began}
    return {"step": number, "lr": rate, **losses, **spent}


def _backward(
    objective: Callable[[Sequence[Unit]], Sums],
    step: Sequence[Unit],
    groups: Sequence[Sequence[int]],
    term_weights: Mapping[str, float],
    scale: float,
) -> Sums:
    """Add `scale` x the gradient of a step's loss, micro-batch by micro-batch; the mean of every term over the step."""
    counts = Counter(unit.term for unit in step)
    means: Sums = {}
    for group in groups:
        sums = objective([step[i] for i in group])
        terms = {name: value / counts[name] for name, value in sums.items()}
        torch.stack([scale * term_weights.get(name, 1.0) * value for name, value in terms.items()]).sum().backward()
        for name, value in terms.items():
            means[name] = means.get(name, 0) + value.detach()
    return means


def _add_up(means: Sums, parameters: Sequence[Tensor], terms: Iterable[str]) -> Sums:
    """The means of all `terms`, and the gradients in place, over all processes, of which each has done a share."""
    if processes.size() == 1:
        return means
    zero = torch.zeros((), device=parameters[0].device)
    total = {name: means.get(name, zero).clone() for name in sorted(terms)}
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=zero.device)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    processes.add_up([*total.values(), reached, *(p.grad for p in parameters if p.grad is not None)])
    for p, count in zip(parameters, reached.tolist(), strict=True):
        p.grad = p.grad if count else None  # as with one process: AdamW leaves alone what no row has reached
    return total


def _finite_norm(step: int, losses: Mapping[str, float], parameters: Mapping[str, Tensor]) -> Tensor:
    """Norm of the whole gradient. Raises NumericError naming the term or the parameter that is not finite.

    To be called before clipping, which would spread one NaN over every gradient.
    """
    for name, value in losses.items():
        if not math.isfinite(value):
            raise NumericError(f"train: the {name} loss is {value} at step {step}; try a lower --lr.")
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    norm = get_total_norm(gradients.values())
    if not torch.isfinite(norm):
        bad = next((name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()), "all together")
        raise NumericError(f"train: the gradient of {bad} is not finite at step {step}.")
    return norm


def _check_divergence(
    losses: Mapping[str, float], norm: float, training: Training, ceilings: Mapping[str, float], s: OptimizerSettings
) -> None:
    """Raise a NumericError when the run is finite still, but lost."""
    step, largest = training.done + 1, training.largest
    for name, ceiling in ceilings.items():
        if losses.get(name, 0) > training.first.get(name, 0) + ceiling:
            raise NumericError(
                f"train: the {name} loss is {losses[name]:.3g} at step {step}, more than {ceiling:.3g} above the first "
                f"step's; try a lower --lr or a larger --lambda, or allow it with --max-{name}-rise."
            )
    if largest and norm > max(s.max_grad_norm, s.max_grad_growth * largest):  # what is not even clipped is no explosion
        raise NumericError(
            f"train: the gradient's norm is {norm:.3g} at step {step}, {norm / largest:.3g} times the largest before; "
            "try a lower --lr, or allow it with --max-grad-growth."
        )
