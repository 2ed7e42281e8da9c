"""What a step is made of: the forget and retain rows that go together, and their losses in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data.examples import Example
from .data.pairing import pairs
from .forward import Progress, Record, answer_logits, base_of
from .losses.bigrams import Bigrams
from .losses.forget import LossFunction, needs
from .original import FINAL, PREFIX, RECORD, observe
from .packing import batch_of
from .prefix import Prefix

if TYPE_CHECKING:
    from .config import ForgetSettings

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
    `retain_hidden`, final hidden states (answer tokens, hidden) per retain row. `bigrams`: of the retain answers, where
    the forget loss wants them. `retain_function` None: no retain rows.
    `prefix`: what the layers below the adapter give, so that they are skipped.
    """

    forget: Sequence[Example]
    retain: Sequence[Example]
    refusals: Sequence[Example]
    forget_function: LossFunction
    retain_function: LossFunction | None
    bigrams: Bigrams | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)
    retain_hidden: dict[int, Tensor] = field(default_factory=dict)
    prefix: Prefix | None = None

    def __post_init__(self) -> None:
        self.inputs = needs(self.forget_function)
        self.uses_original_states = self.retain_function is not None and "original_states" in needs(
            self.retain_function
        )

    def asked(self, used_retain: Iterable[int], scored: Sequence[Example] = ()) -> dict[str, Collection[Example]]:
        """What the losses, `prefix` and scores want of the original model: the rows of each of `original.DEPTHS`."""
        final = sorted(set(used_retain)) if self.uses_original_states else ()
        return {
            RECORD: [*(e for rows in self._references.values() for e in rows), *scored],
            FINAL: [self.retain[i] for i in final],
            PREFIX: self.prefix.rows if self.prefix else (),
        }

    @property
    def _references(self) -> dict[str, Sequence[Example]]:
        rows = {"reference": self.forget, "refusal_reference": self.refusals}
        return {name: rows[name] for name in rows if name in self.inputs}

    def observe_original(
        self,
        model: Any,
        used_retain: Iterable[int],
        token_budget: int,
        *,
        scored: Sequence[Example] = (),
        progress: Progress | None = None,
    ) -> dict[Example, Record]:
        """Take from the original model what is `asked`, in one pass; returns the records, those of `scored` among them.

        Call before the adapter is attached.
        """
        used = set(used_retain)
        found = observe(model, self.asked(used, scored), token_budget, self.prefix, progress)
        for name, rows in self._references.items():
            self.constants[name] = torch.tensor([found.records[e].nll for e in rows])
        self.retain_hidden = {i: found.final[self.retain[i]] for i in used if self.uses_original_states}
        return found.records

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
        if retain and self.uses_original_states:
            hidden = torch.cat([self.retain_hidden[u.index] for u in retain]).to(device)
        batch = batch_of(model, examples)
        with self.prefix.feeding(examples, batch) if self.prefix else nullcontext():
            answers, original = answer_logits(model, batch, hidden)
        *blocks, kept = answers.split([len(forget)] * columns + [len(retain)])
        sums: Sums = {}
        if forget:
            index = torch.tensor([u.index for u in forget])
            given = {name: values[index].to(device) for name, values in self.constants.items()}
            sequences = iter(blocks)
            given |= {name: next(sequences) for name in self.inputs if name in ("answers", "refusals")}
            given |= {"bigrams": self.bigrams} if "bigrams" in self.inputs else {}
            sums["forget"] = self.forget_function(**given).sum()
        if retain and self.retain_function is not None:
            extra = {"original_states": original} if self.uses_original_states else {}
            sums["retain"] = self.retain_function(kept, **extra).sum()
        return sums


class ForgetSteps(Sequence[list[Unit]]):
    """The units of every step of a run, in an order that depends on the seed alone, each made when it is asked for.

    Those of all epochs at once would take more memory than the rows.
    """

    def __init__(self, objective: ForgetObjective, *, epochs: int, batch_size: int, pairing: str, seed: int) -> None:
        self.objective, self.epochs, self.batch_size = objective, epochs, batch_size
        groups = [[e.group for e in examples] for examples in (objective.forget, objective.retain)]
        self.order = lru_cache(maxsize=1)(lambda epoch: pairs(*groups, epoch=epoch, seed=seed, mode=pairing))
        self.per_epoch = math.ceil(len(objective.forget) / batch_size)

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def __getitem__(self, index: int) -> list[Unit]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        epoch, step = divmod(index, self.per_epoch)
        start = step * self.batch_size
        return self.objective.step(self.order(epoch)[start : start + self.batch_size])


def run_steps(objective: ForgetObjective, settings: ForgetSettings) -> ForgetSteps:
    """The units of every step of a run with these settings."""
    s = settings
    return ForgetSteps(objective, epochs=s.epochs, batch_size=s.batch_size, pairing=s.pairing, seed=s.seed)


def retain_rows(steps: Iterable[Sequence[Unit]]) -> set[int]:
    """The retain rows in some steps, by their indices."""
    return {unit.index for step in steps for unit in step if unit.term == "retain"}


def learn(model: Any, units: Sequence[Unit]) -> Sums:
    """The objective of fine-tuning: NLL per answer token, summed over examples."""
    batch = batch_of(model, [u.sequences[0] for u in units])
    return {"learn": answer_logits(model, batch)[0].nll_mean.sum()}


def learn_steps(examples: Sequence[Example], *, epochs: int, batch_size: int, seed: int) -> Iterator[list[Unit]]:
    """Every example once per epoch, in a seeded order."""
    groups = [None] * len(examples)
    for epoch in range(epochs):
        order = [i for i, _ in pairs(groups, groups, epoch=epoch, seed=seed, mode="random")]
        for start in range(0, len(order), batch_size):
            yield [Unit("learn", i, (examples[i],)) for i in order[start : start + batch_size]]


def retain_penalty(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """ReGLU's regulariser .5 sum over sites ||B^T P||_F^2; each pair is a site's trainable B (out, r) and P (out, k).

    It keeps what the adapter writes out of the directions P that retain outputs use. Paper: arXiv 2604.17396.
    """
    return 0.5 * torch.stack([(b.T @ p).square().sum() for b, p in pairs]).sum()
