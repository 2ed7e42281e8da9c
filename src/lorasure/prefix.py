"""The frozen prefix: what enters the lowest adapted decoder layer is a constant of the data, so it is computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .data.examples import Batch, Example, collate, micro_batches
from .forward import answer_hidden
from .layers import computing, decoder_layers
from .sites import Site
from .tried import close, tried

ROOM = 2**30  # bytes that the states may take in any case; above it, no more than the weights of the base do


@dataclass
class Prefix:
    """Decoder layers below `first` are skipped in training; `states`: what leaves the last of them, per row.

    `rows` are those to keep it of. A state is (tokens, hidden) without padding, in the base's dtype, on the CPU.
    `as_tuple`: the layers of this architecture return the hidden states as the first of a tuple.
    """

    layers: Sequence[nn.Module]
    first: int
    rows: Collection[Example]
    states: dict[Example, Tensor] = field(default_factory=dict)
    as_tuple: bool = False

    @contextmanager
    def recording(self, examples: Sequence[Example], batch: Batch, *, alone: bool = False) -> Iterator[None]:
        """Keep the states of those of a batch's examples that are in `rows`, from the model's pass within the context.

        `alone`: nothing else is wanted of the pass, so the layers above are skipped.
        """
        seen: list[Any] = []
        hook = self.layers[self.first - 1].register_forward_hook(lambda _, args, output: seen.append(output))
        try:
            with _returning(self.layers[self.first :] if alone else (), lambda: seen[0]):
                yield
        finally:
            hook.remove()
        self.as_tuple = isinstance(seen[0], tuple)
        hidden = seen[0][0] if self.as_tuple else seen[0]
        parts = hidden[batch.attention_mask.bool()].split([len(e) for e in examples])
        self.states |= {e: part.to("cpu", copy=True) for e, part in zip(examples, parts, strict=True) if e in self.rows}

    @contextmanager
    def feeding(self, examples: Sequence[Example], batch: Batch) -> Iterator[None]:
        """Within the context the model's pass over a batch starts at layer `first`, from the states of its examples."""
        states = torch.cat([self.states[e] for e in examples])
        mask = batch.attention_mask.bool()
        # Padding gets a real state, as it has in a whole pass: a norm of zeros need not have a finite gradient.
        hidden = states[0].to(mask.device).expand(*mask.shape, -1).clone()
        hidden[mask] = states.to(mask.device)
        with _returning(self.layers[: self.first], lambda: (hidden,) if self.as_tuple else hidden):
            yield

    def bytes_of(self, state: Tensor) -> int:
        """What all `rows` take, by one of the states."""
        return sum(map(len, self.rows)) * state[0].nbytes

    def about(self) -> dict[str, int]:
        """For the run's account: the first layer that is computed, of how many, and the bytes that are kept."""
        kept = sum(state.nbytes for state in self.states.values())
        return {"layer": self.first, "of": len(self.layers), "bytes": kept}


def _returning(layers: Iterable[nn.Module], output: Callable[[], Any]) -> AbstractContextManager[None]:
    """Within the context these layers compute nothing and return `output()`; masks and positions stay the model's."""
    return computing(layers, lambda _: lambda *_, **__: output())


def find_prefix(
    model: PreTrainedModel,
    sites: Iterable[Site],
    rows: Sequence[Example],
    token_budget: int,
    note: Callable[[str], None],
) -> Prefix | None:
    """The prefix below the lowest of `sites`, with nothing recorded yet; None where there is none to skip.

    To be called before the adapter is attached. Tries it on the shortest and the longest of `rows`: where a whole pass
    gives something else (layers above that read what those below have computed), or where the states of all rows would
    take too much memory, `note` is told why there is none.
    """
    layers = decoder_layers(model)
    first = lowest_layer(layers, model, sites)
    if first == 0:
        return None
    by_length = sorted(rows, key=len)
    tried = Prefix(layers, first, [by_length[0], by_length[-1]])
    if not _is_faithful(tried, model, token_budget):
        note(f"train: the {first} layers below the adapter are computed at every step: this model cannot skip them.")
        return None
    prefix = Prefix(layers, first, dict.fromkeys(rows))
    needed = prefix.bytes_of(tried.states[by_length[0]])
    if needed > max(ROOM, model.get_memory_footprint()):
        note(
            f"train: the {first} layers below the adapter are computed at every step: to keep what they give for "
            f"{len(prefix.rows)} rows would take {needed / 2**30:.1f} GiB."
        )
        return None
    return prefix


def lowest_layer(layers: Sequence[nn.Module], model: nn.Module, sites: Iterable[Site]) -> int:
    """Number of the lowest layer with one of `sites`; 0 too if a site is in none of them, as nothing is constant then.

    A module that several layers share counts for the lowest of them.
    """
    homes = [set(layer.modules()) for layer in layers]
    modules = {model.get_submodule(site.module) for site in sites}
    return min(next((i for i, home in enumerate(homes) if module in home), 0) for module in modules)


@torch.no_grad()
def _is_faithful(prefix: Prefix, model: PreTrainedModel, token_budget: int) -> bool:
    """Whether passes that start from recorded states end as whole ones: to 1e-4 of the largest, or 8 roundings."""
    rows = list(prefix.rows)
    for group in micro_batches([len(e) for e in rows], token_budget):
        chosen = [rows[i] for i in group]
        batch = collate(chosen).to(model.device)
        expected = answer_hidden(model, batch)
        found = tried(partial(_in_two_parts, prefix, model, chosen, batch))
        if found is None or found.shape != expected.shape:
            return False
        if not close(found, expected, 1e-4, 8, expected.dtype).all():
            return False
    return True


def _in_two_parts(prefix: Prefix, model: PreTrainedModel, chosen: Sequence[Example], batch: Batch) -> Tensor:
    """The final states of a batch from recorded ones."""
    with prefix.recording(chosen, batch, alone=True):
        answer_hidden(model, batch)
    with prefix.feeding(chosen, batch):
        return answer_hidden(model, batch)
