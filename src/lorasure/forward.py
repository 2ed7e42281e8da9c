"""The one forward pass that everything shares: vocabulary logits at answer positions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .data.examples import Batch, Example, collate, micro_batches
from .losses.tokens import Answers, selected_answers, shift

Progress = Callable[[int], None]

ROWS = 128  # answer tokens at a time whose whole distributions are held a second time


@contextmanager
def _select_before_head(model: PreTrainedModel, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `choose` replace the hidden states that enter the projection to the vocabulary.

    Whatever the model does to logits afterwards (scaling, soft-capping) still happens, because it happens to the
    output.
    """

    def hook(module: torch.nn.Module, args: tuple) -> tuple:
        return (choose(args[0]), *args[1:])

    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has a projection to the vocabulary"
    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT or distributed wrapper."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answer_logits(model: Any, batch: Batch, reference_hidden: Tensor | None = None) -> tuple[Answers, Tensor | None]:
    """One forward pass with vocabulary logits only where an answer token is predicted.

    `reference_hidden` (n, hidden): final hidden states of the *original* model (see `answer_hidden`); they are
    projected in the same product, which gives the original model's logits (n, vocab) without a second model, because
    the projection to the vocabulary is never adapted. Returns (answers, reference logits or None).
    """
    mask, _ = shift(batch.labels)

    def choose(hidden: Tensor) -> Tensor:
        picked = hidden[mask]
        if reference_hidden is not None:
            picked = torch.cat([picked, reference_hidden.to(picked.dtype)])
        return picked[None]

    with _select_before_head(base_of(model), choose):
        logits = model(**batch.inputs, use_cache=False).logits[0]
    count = int(mask.sum())
    reference = None if reference_hidden is None else logits[count:].float()
    return selected_answers(logits[:count], batch.labels), reference


@torch.no_grad()
def answer_hidden(model: Any, batch: Batch) -> Tensor:
    """Final hidden states (answer tokens, hidden) that predict the answer tokens, in row-major order."""
    mask, _ = shift(batch.labels)
    kept: list[Tensor] = []

    def choose(hidden: Tensor) -> Tensor:
        kept.append(hidden[mask])
        return hidden[:, :1]  # one token's logits: the vocabulary projection itself is not wanted here

    with _select_before_head(base_of(model), choose):
        model(**batch.inputs, use_cache=False)
    return kept[0]


@dataclass(frozen=True)
class Record:
    """The model on one answer: one number per answer token in each column, end of text included.

    `log_probs`: log-probability of the label in nats. `correct`: whether the label is the argmax. `expected` (nats) and
    `variance` (nats squared): mean and variance of log p over the vocabulary when tokens are drawn from p itself, which
    is what Min-K++ standardises by.
    """

    log_probs: tuple[float, ...]
    correct: tuple[bool, ...]
    expected: tuple[float, ...]
    variance: tuple[float, ...]

    @property
    def tokens(self) -> int:
        return len(self.correct)

    @property
    def nll(self) -> float:
        """nats, summed over the answer tokens"""
        return -sum(self.log_probs)

    @property
    def mean_nll(self) -> float:
        """nats per answer token"""
        return self.nll / self.tokens


@torch.no_grad()
def answer_records(
    model: Any, examples: Sequence[Example], token_budget: int, progress: Progress | None = None
) -> list[Record]:
    """One record per example, in order. The result does not depend on `token_budget` (padded tokens per pass)."""
    records: list[Record | None] = [None] * len(examples)
    for group in micro_batches([len(e) for e in examples], token_budget):
        answers, _ = answer_logits(model, collate([examples[i] for i in group]).to(base_of(model).device))
        columns = (answers.log_probs, answers.logits.argmax(-1) == answers.targets, *vocabulary_moments(answers))
        sizes = [examples[i].answer_length for i in group]
        for i, *parts in zip(group, *(column.split(sizes) for column in columns), strict=True):
            records[i] = Record(*(tuple(part.tolist()) for part in parts))
        if progress:
            progress(len(group))
    return [record for record in records if record is not None]


def vocabulary_moments(answers: Answers) -> tuple[Tensor, Tensor]:
    """Mean and variance of log p(v) over the vocabulary, v drawn from p itself, (tokens,) each, in nats.

    The mean is minus the entropy. The variance is taken around it, so it is never negative.
    """
    means, variances = [], []
    for logits, normaliser in zip(answers.logits.split(ROWS), answers.log_normaliser.split(ROWS), strict=True):
        log_p = logits - normaliser[:, None]
        p = log_p.exp()
        log_p = log_p.masked_fill(p == 0, 0)  # 0 log 0 = 0, also where the model rules tokens out with -inf
        means.append((p * log_p).sum(-1))
        variances.append((p * (log_p - means[-1][:, None]).square()).sum(-1))
    return torch.cat(means), torch.cat(variances)
