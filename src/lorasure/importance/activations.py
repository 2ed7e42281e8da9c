"""Second moments of what a site reads or writes, for the initialisations that choose directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import processes
from ..data.examples import Example, collate, micro_batches
from ..errors import NumericError, UsageError
from ..forward import Progress, answer_hidden
from ..layers import decoder_layers
from ..memory import free_on
from ..precision import operand, product
from ..sites import Site, grouped
from ..tap import tap
from .moments import wide

BYTES = 4 + 8  # of one element: one set's moments in float32 while the other's are summed in float64
ROOM = 3 * 2**31  # bytes of second moments held at once: a decoder layer of a 7B model and both sets take 2.1e9
SHARE = 3  # of the memory that is free on a GPU, one in so many bytes may be held where that is more

# Whether a pass of a model runs every decoder layer once.
_ONCE: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def room_on(device: torch.device, weights: int = 0) -> int:
    """Bytes of second moments to hold at once, as every group of sites costs a pass over both sets.

    `weights`: bytes of the base, if it is not on the device yet. Of several processes each must find the same.
    """
    if device.type != "cuda" or processes.size() > 1:
        return ROOM
    return max(ROOM, (free_on(device) - weights) // SHARE)


def side_of(evidence: str) -> int:
    """The axis of a site's shape (out, in) that second moments of its `outputs` or `inputs` run over."""
    return {"outputs": 0, "inputs": 1}[evidence]


def _check_shared(name: str, owner: str, *, same: bool) -> None:
    if not same:
        raise UsageError(
            f"Layer '{name}' reads what '{owner}' reads, and something else too, so its inputs cannot be measured; "
            "leave it out with --exclude."
        )


@torch.no_grad()
def second_moments(
    model: PreTrainedModel,
    sites: Sequence[Site],
    examples: Sequence[Example],
    *,
    of_inputs: bool,
    token_budget: int,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """C = E[z z^T] over all real tokens (prompt and answer, padding left out), uncentred, per site, float32.

    z is the site's output including its bias (shape of C: (out, out)), or with `of_inputs` its input ((in, in)), and
    then sites that read the same tensor (q, k and v) share one C. For an expert the mean runs over all tokens of the
    data, those routed elsewhere counting as zero. Several processes share out the passes. Paper: ReGLU, arXiv
    2604.17396.
    """
    total: dict[str, Tensor] = {}
    owners: dict[str, str] = {}  # site -> the site whose C it shares, itself where it was the first to read a tensor
    tokens, mask, last = 0, torch.empty(0), (torch.empty(0), "")

    def observe(site: Site, x: Tensor, y: Tensor) -> None:
        nonlocal last
        z = x if of_inputs else y
        same = z.data_ptr() == last[0].data_ptr() and z.shape == last[0].shape
        owner = owners.setdefault(site.name, last[1] if same else site.name)
        if owner != site.name:
            _check_shared(site.name, owner, same=same)
            return
        last = z, site.name  # held, so that its memory is nobody else's while it is compared with
        z = operand(z[mask])
        _add(total, site.name, product(z.T, z))

    groups = micro_batches([len(e) for e in examples], token_budget)
    # A process without a pass would not know which sites share; where weights are shared out, all must make as many.
    shared = 1 < processes.size() <= len(groups) and not processes.sharded()
    with _ending_above(model, sites), tap(model, sites, forward=observe):
        for group in processes.share(groups) if shared else groups:
            batch = collate([examples[i] for i in group]).to(model.device)
            mask, last = batch.attention_mask.bool(), (torch.empty(0), "")
            with suppress(_Enough):
                answer_hidden(model, batch)
            tokens += int(mask.sum())
            if progress:
                progress(len(group) * (processes.size() if shared else 1))
    count = torch.tensor(float(tokens), device=model.device)
    if shared:
        processes.add_up([count])
    for site in sites:
        if owners.get(site.name, site.name) != site.name:
            continue
        size = site.shape[1] if of_inputs else site.shape[0]
        if site.name not in total:
            _add(total, site.name, torch.zeros(size, size, device=model.device))
        moment = total[site.name]
        if shared:
            processes.add_up([moment])
        moment = total[site.name] = moment.div_(float(count)).float().to(model.device)
        if not torch.isfinite(moment).all():
            raise NumericError(f"activations: the second moments of site '{site.name}' are not finite.")
    return {site.name: total[owners.get(site.name, site.name)] for site in sites}


def _add(total: dict[str, Tensor], name: str, found: Tensor) -> None:
    """In float64: directions with little between them would else depend on the order, so on who took which pass."""
    if name in total:
        total[name] += found.to(total[name].device)
    else:
        total[name] = wide(found)


class _Enough(Exception):
    """A pass has seen all sites."""


def _runs_once(model: PreTrainedModel) -> bool:
    """Whether a pass runs every decoder layer once, as one over a single token shows: some models run a block again."""
    if model not in _ONCE:
        layers, runs = decoder_layers(model), list[int]()
        handles = [layer.register_forward_pre_hook(lambda *_: runs.append(1)) for layer in layers]
        try:
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        _ONCE[model] = len(runs) == len(layers)
    return _ONCE[model]


@contextmanager
def _ending_above(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[None]:
    """Within the context a pass raises _Enough where it leaves the last decoder layer that holds one of the sites."""
    layers = decoder_layers(model)
    homes = {module: number for number, layer in enumerate(layers) for module in layer.modules()}
    above = 1 + max(homes.get(model.get_submodule(site.module), len(layers)) for site in sites)
    # Not where layers are gathered one after another, each by all processes: an end in between is not foreseen there.
    if above >= len(layers) or processes.sharded() or not _runs_once(model):
        yield
        return

    def end(*_: Any) -> None:
        raise _Enough

    handle = layers[above].register_forward_pre_hook(end)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class InGroups:
    """Second moments of forget and retain set by site, measured for some sites at a time, so that memory is bounded.

    To be asked for in the order of `sites`: one that is not held is measured with as many of the next as fit into
    `room` bytes (one at least), and what was held is let go. `measure(sites)`: site name -> moments, for each set.
    """

    sites: Sequence[Site]
    evidence: str
    measure: Callable[[Sequence[Site]], Sequence[Mapping[str, Tensor]]]
    room: int
    held: Sequence[Mapping[str, Tensor]] = ({}, {})

    def __call__(self, site: Site) -> tuple[Tensor, Tensor]:
        """(forget, retain) of one site."""
        if site.name not in self.held[0]:
            self.held = ({}, {})
            self.held = self.measure(self.group(self.sites.index(site)))
        return self.held[0][site.name], self.held[1][site.name]

    def group(self, first: int) -> Sequence[Site]:
        """The sites that are measured together from number `first` on. None is counted as shared."""
        return next(grouped(self.sites[first:], self._size, self.room))

    @property
    def groups(self) -> list[list[Site]]:
        """All of them."""
        return list(grouped(self.sites, self._size, self.room))

    def _size(self, site: Site) -> int:
        """Bytes of the second moments of both sets, at most."""
        return BYTES * site.shape[side_of(self.evidence)] ** 2
