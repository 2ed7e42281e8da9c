"""The frozen prefix: what enters the lowest adapted decoder layer is a constant of the data, so it is computed once.

So is what the attention of that layer gives, where the adapter begins after it.
"""

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
    """Decoder layers below `first` are skipped in training, and so is `attention`, that of layer `first` (or None).

    `rows` are those to keep states of. A state is (tokens, hidden), with an attention (tokens, 2 hidden): what leaves
    the last skipped layer, and what the attention gives; without padding, in the base's dtype, on the CPU. `sizes`: how
    long a tuple each of them begins in this architecture, 0 if it comes alone.
    """

    layers: Sequence[nn.Module]
    first: int
    rows: Collection[Example]
    attention: nn.Module | None = None
    states: dict[Example, Tensor] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    @property
    def _kept(self) -> list[nn.Module]:
        """The modules whose outputs are the states."""
        return [self.layers[self.first - 1], *([self.attention] if self.attention else [])]

    @contextmanager
    def recording(self, examples: Sequence[Example], batch: Batch, *, alone: bool = False) -> Iterator[None]:
        """Keep the states of those of a batch's examples that are in `rows`, from the model's pass within the context.

        `alone`: nothing else is wanted of the pass, so the layers above are skipped.
        """
        kept, seen = self._kept, {}  # of the last pass, if there is another to try the model
        hooks = [m.register_forward_hook(lambda module, _, output: seen.update({module: output})) for m in kept]
        above = self.layers[self.first + len(kept) - 1 :]
        try:
            with _returning(above if alone else (), lambda: seen[kept[0]]):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        outputs = [seen[module] for module in kept]
        self.sizes = [len(output) if isinstance(output, tuple) else 0 for output in outputs]
        hidden = torch.cat([o[0] if size else o for o, size in zip(outputs, self.sizes, strict=True)], -1)
        parts = hidden[batch.attention_mask.bool()].split([len(e) for e in examples])
        self.states |= {e: part.to("cpu", copy=True) for e, part in zip(examples, parts, strict=True) if e in self.rows}

    @contextmanager
    def feeding(self, examples: Sequence[Example], batch: Batch) -> Iterator[None]:
        """Within the context the model's pass over a batch starts at layer `first`, from the states of its examples."""
        states = torch.cat([self.states[e] for e in examples])
        mask = batch.attention_mask.bool()
        # Padding gets a real state, as it has in a whole pass: a norm of zeros need not have a finite gradient.
        whole = states[0].to(mask.device).expand(*mask.shape, -1).clone()
        whole[mask] = states.to(mask.device)
        parts = zip(whole.chunk(len(self.sizes), -1), self.sizes, strict=True)
        below, *attended = [(part, *[None] * (size - 1)) if size else part for part, size in parts]
        with _returning(self.layers[: self.first], lambda: below), _returning(self._kept[1:], lambda: attended[0]):
            yield

    @property
    def skipped(self) -> float:
        """The share of the layers that training leaves out."""
        return self.first / len(self.layers)

    def bytes_of(self, state: Tensor) -> int:
        """What all `rows` take, by one of the states."""
        return sum(map(len, self.rows)) * state[0].nbytes

    def about(self) -> dict[str, int]:
        """For the run's account: the first layer that is computed, of how many, and the bytes that are kept."""
        kept = sum(state.nbytes for state in self.states.values())
        return {"layer": self.first, "of": len(self.layers), "bytes": kept}


def tokens_per_pass(budget: int, skipped: float) -> int:
    """Padded tokens that take no more memory without the `skipped` share of the layers than `budget` tokens with it."""
    return round(budget / (1 - skipped))


def _returning(modules: Iterable[nn.Module], output: Callable[[], Any]) -> AbstractContextManager[None]:
    """Within the context these compute nothing and return `output()`; masks and positions stay the model's."""
    return computing(modules, lambda _: lambda *_, **__: output())


def find_prefix(
    model: PreTrainedModel,
    sites: Collection[Site],
    rows: Sequence[Example],
    token_budget: int,
    note: Callable[[str], None],
    *,
    compiled: bool = False,
) -> Prefix | None:
    """The prefix below the lowest of `sites`, with nothing recorded yet; None where there is none to skip.

    To be called before the adapter is attached. Tries it on the shortest and the longest of `rows`: where a whole pass
    gives something else (layers above that read what those below have computed), or where the states of all rows would
    take too much memory, `note` is told why there is none. `compiled`: the layers will be (see `keeps_attention`).
    """
    layers = decoder_layers(model)
    first, adapted = lowest_layer(layers, model, sites), _modules(model, sites)
    if first == 0:
        return None
    by_length = sorted(rows, key=len)
    attention = constant_attention(layers[first], model, sites) if keeps_attention(model.device, compiled) else None
    for chosen in dict.fromkeys([attention, None]):
        trial = Prefix(layers, first, [by_length[0], by_length[-1]], chosen)
        if not _is_faithful(trial, model, adapted, token_budget):
            why = "this model cannot skip them."
            continue
        prefix = Prefix(layers, first, dict.fromkeys(rows), chosen)
        needed = prefix.bytes_of(trial.states[by_length[0]])
        if needed <= max(ROOM, model.get_memory_footprint()):
            return prefix
        why = f"to keep what they give for {len(prefix.rows)} rows would take {needed / 2**30:.1f} GiB."
    note(f"train: the {first} layers below the adapter are computed at every step: {why}")
    return None


def keeps_attention(device: torch.device, compiled: bool) -> bool:
    """Whether the attention of the lowest adapted layer may be kept: not of a layer that is compiled as a whole, nor on
    a GPU, which computes an attention sooner than it gets one from the host."""
    return device.type == "cpu" and not compiled


def constant_attention(layer: nn.Module, model: nn.Module, sites: Iterable[Site]) -> nn.Module | None:
    """The attention of the lowest layer with one of `sites`, if none is in it."""
    adapted = _modules(model, sites)
    named = (child for name, child in layer.named_children() if "att" in name)
    found = (child for child in named if any(p.dim() > 1 for p in child.parameters()))  # no norm of that name
    return next((child for child in found if not adapted.intersection(child.modules())), None)


def lowest_layer(layers: Sequence[nn.Module], model: nn.Module, sites: Iterable[Site]) -> int:
    """Number of the lowest layer with one of `sites`; 0 too if a site is in none of them, as nothing is constant then.

    A module that several layers share counts for the lowest of them.
    """
    homes = [set(layer.modules()) for layer in layers]
    return min(next((i for i, home in enumerate(homes) if module in home), 0) for module in _modules(model, sites))


def _modules(model: nn.Module, sites: Iterable[Site]) -> set[nn.Module]:
    return {model.get_submodule(site.module) for site in sites}


@torch.no_grad()
def _is_faithful(prefix: Prefix, model: PreTrainedModel, adapted: set[nn.Module], token_budget: int) -> bool:
    """Whether passes that start from recorded states end as whole ones: to 1e-4 of the largest, or 8 roundings.

    Of a model whose `adapted` modules give something else than when the states were recorded, as they do in training.
    """
    rows = list(prefix.rows)
    for group in micro_batches([len(e) for e in rows], token_budget):
        chosen = [rows[i] for i in group]
        batch = collate(chosen).to(model.device)
        with _halved(adapted):
            expected = answer_hidden(model, batch)
        found = tried(partial(_in_two_parts, prefix, model, adapted, chosen, batch))
        if found is None or found.shape != expected.shape:
            return False
        if not close(found, expected, 1e-4, 8, expected.dtype).all():
            return False
    return True


def _in_two_parts(
    prefix: Prefix, model: PreTrainedModel, adapted: set[nn.Module], chosen: Sequence[Example], batch: Batch
) -> Tensor:
    """The final states of a batch from recorded ones."""
    with prefix.recording(chosen, batch, alone=True):
        answer_hidden(model, batch)
    with prefix.feeding(chosen, batch), _halved(adapted):
        return answer_hidden(model, batch)


@contextmanager
def _halved(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context these give half of what they give."""
    half = lambda _, args, output: output / 2 if isinstance(output, Tensor) else output  # noqa: E731
    hooks = [module.register_forward_hook(half) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
