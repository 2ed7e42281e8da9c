"""What a run takes from the original model, before the adapter is attached: in one pass, no row twice."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .data.examples import Example, collate, micro_batches
from .forward import Progress, Record, answer_hidden, base_of, batch_records
from .losses.tokens import shift
from .prefix import Prefix

RECORD, FINAL, PREFIX = DEPTHS = ("record", "final", "prefix")  # what can be asked of a row, the dearest first


@dataclass
class Original:
    """Of the original model: `records`, and the `final` hidden states (answer tokens, hidden) that predict answers."""

    records: dict[Example, Record] = field(default_factory=dict)
    final: dict[Example, Tensor] = field(default_factory=dict)


@torch.no_grad()
def observe(
    model: Any,
    asked: Mapping[str, Collection[Example]],
    token_budget: int,
    prefix: Prefix | None = None,
    progress: Progress | None = None,
) -> Original:
    """One pass over the rows in `asked`, each as far up the model as the dearest of DEPTHS that it is asked for.

    States below the adapter go into `prefix`. Which rows share a batch depends on `asked` and the budget alone, so
    doing it again gives the same bits.
    """
    found, final = Original(), set(asked[FINAL])
    done: set[Example] = set()
    for depth in DEPTHS:
        rows = [example for example in dict.fromkeys(asked[depth]) if example not in done]
        done |= set(rows)
        for group in micro_batches([len(e) for e in rows], token_budget):
            chosen = [rows[i] for i in group]
            batch = collate(chosen).to(base_of(model).device)
            recording = prefix.recording(chosen, batch, alone=depth == PREFIX) if prefix else nullcontext()
            with recording, _entering_head(model) as hidden:
                if depth == RECORD:
                    found.records |= zip(chosen, batch_records(model, chosen, batch), strict=True)
                else:
                    answer_hidden(model, batch)
            parts = hidden[0][shift(batch.labels)[0]].split([e.answer_length for e in chosen])
            found.final |= {e: part.to("cpu", copy=True) for e, part in zip(chosen, parts, strict=True) if e in final}
            if progress:
                progress(len(group))
    return found


@contextmanager
def _entering_head(model: Any) -> Iterator[list[Tensor]]:
    """The hidden states (examples, tokens, hidden) that enter the projection to the vocabulary, before any choice."""
    seen: list[Tensor] = []
    head = base_of(model).get_output_embeddings()
    assert head is not None, "a causal language model has a projection to the vocabulary"
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
