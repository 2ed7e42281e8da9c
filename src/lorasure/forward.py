"""The one forward pass that everything shares: vocabulary logits at answer positions only, and a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .answer_rows import at_answers
from .data.examples import Batch, Example, collate, micro_batches
from .losses.tokens import Answers, batch_answers, log_prob, shift

Progress = Callable[[int], None]

# Whether a model's logits are the projection and nothing more (scaling, soft-capping), as its first pass showed.
_PROJECTS_ONLY: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def _select_before_head(head: torch.nn.Module, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `choose` replace the hidden states that enter the projection to the vocabulary.

    Whatever the model does to logits afterwards (scaling, soft-capping) still happens, because it happens to the
    output.
    """

    def hook(module: torch.nn.Module, args: tuple) -> tuple:
        return (choose(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT or distributed wrapper."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head_of(model: Any) -> torch.nn.Module:
    head = base_of(model).get_output_embeddings()
    assert head is not None, "a causal language model has a projection to the vocabulary"
    return head


def answer_logits(model: Any, batch: Batch, reference_hidden: Tensor | None = None) -> tuple[Answers, Tensor | None]:
    """One forward pass, with vocabulary logits only where an answer token is predicted, and when a loss takes them.

    Of a model that has been tried for that (`find_free_layers`), much of the last layer is computed there only too.
    `reference_hidden` (n, hidden): final hidden states of the *original* model (see `answer_hidden`). Returned are the
    answers, and the states of the original of which their projection makes its logits without a second model, because
    the projection to the vocabulary is never adapted. For a model that does more to logits than project, and for a
    projection that is trained, the states are the logits of the whole batch.
    """
    head = _head_of(model)
    mask, _ = shift(batch.labels)
    restricted = partial(at_answers, base_of(model), mask)
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())
    if not trained and _PROJECTS_ONLY.get(model, True):
        with restricted():
            hidden, first = _answer_states(model, batch)
        if model not in _PROJECTS_ONLY:
            with torch.no_grad():
                _PROJECTS_ONLY[model] = torch.equal(head(hidden[None, :1])[0].to(first.dtype), first)
        if _PROJECTS_ONLY[model]:
            return batch_answers(hidden, batch, head), reference_hidden

    def choose(hidden: Tensor) -> Tensor:
        picked = hidden[mask]
        if reference_hidden is not None:
            picked = torch.cat([picked, reference_hidden.to(picked.dtype)])
        return picked[None]

    with _select_before_head(head, choose), restricted():
        logits = model(**batch.inputs, use_cache=False).logits[0]
    count = int(mask.sum())
    return batch_answers(logits[:count], batch), None if reference_hidden is None else logits[count:]


def _answer_states(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(final hidden states (answer tokens, hidden), in row-major order; the model's logits of the first).

    The latter are (1, vocab), or (0, vocab) where what the model makes of hidden states is known already.
    """
    mask, _ = shift(batch.labels)
    kept: list[Tensor] = []

    def choose(hidden: Tensor) -> Tensor:
        kept.append(hidden[mask])
        return kept[-1][None, : 0 if model in _PROJECTS_ONLY else 1].detach()

    with _select_before_head(_head_of(model), choose):
        logits = model(**batch.inputs, use_cache=False).logits[0]
    return kept[0], logits


@torch.no_grad()
def answer_hidden(model: Any, batch: Batch) -> Tensor:
    """Final hidden states (answer tokens, hidden) that predict the answer tokens, in row-major order."""
    return _answer_states(model, batch)[0]


@dataclass(frozen=True)
class Record:
    """The model on one answer: one number per answer token in each column, end of text included.

    `log_probs`: log-probability of the label in nats. `correct`: whether the label is the argmax. `expected` (nats) and
    `variance` (nats squared), empty unless asked for: mean and variance of log p over the vocabulary when tokens are
    drawn from p itself, which is what Min-K++ standardises by.
    """

    log_probs: tuple[float, ...]
    correct: tuple[bool, ...]
    expected: tuple[float, ...] = ()
    variance: tuple[float, ...] = ()

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
def batch_records(model: Any, examples: Sequence[Example], batch: Batch, *, moments: bool = False) -> list[Record]:
    """One record per example, in order, from one pass over their batch."""
    answers, _ = answer_logits(model, batch.to(base_of(model).device))
    found = answers.per_token(partial(_columns, moments=moments))
    parts = found.cpu().split([e.answer_length for e in examples])
    rows = ([tuple(column) for column in part.T.tolist()] for part in parts)
    return [Record(log_probs, tuple(map(bool, correct)), *more) for log_probs, correct, *more in rows]


@torch.no_grad()
def answer_records(
    model: Any,
    examples: Sequence[Example],
    token_budget: int,
    progress: Progress | None = None,
    *,
    moments: bool = False,
) -> list[Record]:
    """One record per example, in order. The result does not depend on `token_budget` (padded tokens per pass).

    `moments`: also the mean and variance of log p, which takes as long again as all else that is done with logits.
    """
    records: list[Record | None] = [None] * len(examples)
    for group in micro_batches([len(e) for e in examples], token_budget):
        chosen = [examples[i] for i in group]
        for i, record in zip(group, batch_records(model, chosen, collate(chosen), moments=moments), strict=True):
            records[i] = record
        if progress:
            progress(len(group))
    return [record for record in records if record is not None]


def _columns(logits: Tensor, targets: Tensor, *, moments: bool) -> Tensor:
    """(n, 2 or 4), in the order of Record's fields."""
    correct = (logits.argmax(-1) == targets).to(logits.dtype)
    more = vocabulary_moments(logits) if moments else ()
    return torch.stack([log_prob(logits, targets), correct, *more], dim=-1)


def vocabulary_moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of log p(v) over the vocabulary, v drawn from p itself, (tokens,) each, in nats.

    The mean is minus the entropy. The variance is taken around it, so it is never negative.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    log_p = log_p.masked_fill(p == 0, 0)  # 0 log 0 = 0, also where the model rules tokens out with -inf
    mean = (p * log_p).sum(-1)
    return mean, (p * (log_p - mean[:, None]).square()).sum(-1)
