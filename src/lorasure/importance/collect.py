"""Model + batches -> moments of per-example gradients, by hooks, in one forward and one backward pass.

For one example with layer inputs X (tokens, in) and output gradients D (tokens, out), the gradient of W is D^T X. With
LoRA factors B (out, k), A (k, in) added in such a way that the model's function does not change, the factors' gradients
are s D^T (X A^T) and s (D B)^T X of the *unchanged* X and D. So no adapter is built, no weight needs a gradient, and
the model measured is exactly the model. The published code adds its random probe to the model uncompensated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import processes
from ..data.examples import Example, collate, micro_batches
from ..errors import NumericError, UsageError
from ..forward import Progress, answer_logits
from ..precision import operand, product
from ..sites import Site, grouped
from ..tap import tap
from .moments import Moments

FULL_CHUNK = 2**24  # elements of per-example full gradients held at once
LEFT_AND_RIGHT = {"lora": ("B", "A"), "sketch": ("rows", "columns")}
LEFT = {left for left, _ in LEFT_AND_RIGHT.values()}
SetMoments = dict[str, dict[str, Moments]]


@dataclass(frozen=True)
class Probe:
    """The random factors of `lora` and `sketch` space. Drawn per site from the seed and the site's name alone."""

    space: str
    rank: int
    sigma: float
    scaling: float
    seed: int

    def factors(self, site: Site, device: torch.device) -> dict[str, Tensor]:
        """lora: A, B ~ N(0, sigma^2) (VILA, sigma .05). sketch: entries N(0, 1/k), so that E[A^T A] = I. full: none.

        Seeding by name makes a site's probe independent of which other sites are measured.
        """
        if self.space == "full":
            return {}
        digest = hashlib.sha256(f"{self.seed}/{site.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        deviation = self.sigma if self.space == "lora" else self.rank**-0.5
        out, features = site.shape
        return {
            "A": (torch.randn(self.rank, features, generator=generator) * deviation).to(device),
            "B": (torch.randn(out, self.rank, generator=generator) * deviation).to(device),
        }

    def operands(self, site: Site, model: PreTrainedModel) -> dict[str, Tensor]:
        """`factors` as `per_example` takes them: in lora space times the scaling, which both gradients have."""
        dtype = operand(torch.empty(0, dtype=model.dtype, device=model.device)).dtype
        scale = self.scaling if self.space == "lora" else 1.0
        return {name: (scale * f).to(dtype) for name, f in self.factors(site, model.device).items()}

    def shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        """Factor name -> shape of its gradient, as `per_example` gives them."""
        out, features = site.shape
        if self.space == "full":
            return {"W": site.shape}
        left, right = LEFT_AND_RIGHT[self.space]
        return {left: (out, self.rank), right: (self.rank, features)}


def per_example(probe: Probe, operands: dict[str, Tensor], x: Tensor, d: Tensor) -> Iterable[dict[str, Tensor]]:
    """Per-example gradients (examples, ...) of one site from x (examples, tokens, in) and d (examples, tokens, out).

    `operands`: see `Probe.operands`. Yields one dictionary, or several over chunks of examples in `full` space, where a
    gradient is as large as W.
    """
    x, d = operand(x), operand(d)
    if probe.space == "full":
        step = max(1, FULL_CHUNK // (x.shape[-1] * d.shape[-1]))
        for start in range(0, len(x), step):
            yield {"W": product(d[start : start + step].mT, x[start : start + step])}
        return
    a, b = (operands[name].to(x.dtype) for name in "AB")
    # Always k rows times many columns: several times as fast as many rows times k columns.
    left = product((x @ a.T).mT, d).mT
    if x.is_cuda:  # half the time there, where a number of tokens that is no multiple of 8 has slow kernels
        right = product((d @ b).mT, x)
    else:
        right = product((b.T @ d.flatten(0, 1).T).unflatten(1, d.shape[:2]).transpose(0, 1), x)
    yield dict(zip(LEFT_AND_RIGHT[probe.space], (left, right), strict=True))


def moments(
    model: PreTrainedModel,
    sites: Sequence[Site],
    examples: Sequence[Example],
    probe: Probe,
    *,
    token_budget: int,
    progress: Progress | None = None,
) -> SetMoments:
    """Moments of the gradient of every site over `examples`: site name -> factor name -> Moments.

    Raises NumericError at the first non-finite loss or gradient, naming the row or site.
    """
    operands = {site: probe.operands(site, model) for site in sites}
    together = list(_together(sites, probe, model.device))
    home = {site: some for some in together for site in some.sites}
    seen: set[Site] = set()  # in this pass

    def observe(site: Site, x: Tensor, d: Tensor) -> None:
        if site in seen:
            raise UsageError(
                f"Layer '{site.name}' is used more than once per pass, so its gradients come in parts and cannot "
                "be measured; leave it out with --exclude."
            )
        seen.add(site)
        for values in per_example(probe, operands[site], x, d):
            home[site].add(site, values)

    with tap(model, sites, backward=observe):
        for group in processes.share(micro_batches([len(e) for e in examples], token_budget)):
            batch = [examples[i] for i in group]
            seen.clear()
            backward(model, batch)
            for some in together:
                some.end_pass()
            if progress:
                progress(len(batch) * processes.size())
    for some in together:
        some.finish(len(examples))
    result = {name: kept for some in together for name, kept in some.moments().items()}
    _check_finite(result)
    return result


def backward(model: PreTrainedModel, batch: Sequence[Example]) -> None:
    """One pass: the sum over examples of their mean NLL per answer token, and its gradients to whoever listens."""
    answers, _ = answer_logits(model, collate(batch).to(model.device))
    losses = answers.nll_mean
    if not torch.isfinite(losses).all():
        worst = int((~torch.isfinite(losses)).nonzero()[0])
        raise NumericError(f"importance: the model's loss on {batch[worst].place} is {losses[worst].item()}.")
    if losses.requires_grad:  # else no token was routed to any of the experts that are listened to
        losses.sum().backward()


class _Together:
    """The moments of some sites, kept as those of one long vector: for a GPU it is the number of calls that takes time.

    In it each site has its left factor, transposed as `per_example` finds it, and its right one. In `full` space there
    is one site.
    """

    def __init__(self, sites: Sequence[Site], probe: Probe, device: torch.device) -> None:
        self.sites = sites
        self.shapes = [(site, name, shape) for site in sites for name, shape in probe.shapes(site).items()]
        self.kept = Moments.empty((sum(prod(shape) for _, _, shape in self.shapes),), device)
        self.waiting: dict[Site, Mapping[str, Tensor]] = {}

    def add(self, site: Site, values: Mapping[str, Tensor]) -> None:
        """Per-example gradients of a site, which are held until those of all sites are there."""
        self.waiting[site] = values
        if len(self.waiting) == len(self.sites):
            self.end_pass()

    def end_pass(self) -> None:
        """Add what waits. A site that no token of the pass has reached has gradients of zero."""
        if self.waiting:
            self.kept.update(self._joined())

    def _joined(self) -> Tensor:
        """(examples, all elements) of what waits, which is let go."""
        count = len(next(value for values in self.waiting.values() for value in values.values()))
        parts = []
        for site, name, shape in self.shapes:
            value = self.waiting[site][name] if site in self.waiting else self.kept.mean.new_zeros(count, *shape)
            parts.append((value.mT if name in LEFT else value).flatten(1))
        self.waiting = {}
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def finish(self, count: int) -> None:
        """Add up over the processes, and count the examples of passes that reached none of the sites (an expert)."""
        self.kept.add_up()
        if missing := count - self.kept.count:
            zeros = torch.zeros_like(self.kept.mean)
            self.kept.merge(Moments(missing, zeros, zeros.clone(), zeros.clone()))

    def moments(self) -> SetMoments:
        """Site name -> factor name -> moments, each with memory of its own unless there is one alone."""
        sizes = [prod(shape) for _, _, shape in self.shapes]
        found: SetMoments = {site.name: {} for site in self.sites}
        parts = (t.split(sizes) for t in self.kept.tensors().values())
        for (site, name, shape), *flat in zip(self.shapes, *parts, strict=True):
            factor = [t.view(shape[::-1]).mT if name in LEFT else t.view(shape) for t in flat]
            if len(sizes) > 1:
                factor = [t.clone(memory_format=torch.contiguous_format) for t in factor]
            found[site.name][name] = Moments(self.kept.count, *factor)
        return found


def together_limit(*, on_cpu: bool) -> int:
    """Elements of one example's gradients, up to which sites share their sums.

    On a CPU calls cost nothing, and what is held for the sums grows with the rows of a pass: 2^14 are as fast there.
    """
    return 2**14 if on_cpu else 2**18


def _together(sites: Sequence[Site], probe: Probe, device: torch.device) -> Iterator[_Together]:
    """All sites, in their order. An expert is alone, as not every pass reaches it, and so is a site in `full` space."""
    room = together_limit(on_cpu=device.type == "cpu")

    def size(site: Site) -> int:
        alone = probe.space == "full" or site.expert is not None
        return room if alone else sum(prod(shape) for shape in probe.shapes(site).values())

    return (_Together(group, probe, device) for group in grouped(sites, size, room))


def _check_finite(result: SetMoments) -> None:
    found = [
        (site, name, list(kept.tensors().values()))
        for site, factors in result.items()
        for name, kept in factors.items()
    ]
    # One sum of all shows it, for which a GPU is waited for once; only then each is looked at.
    if not torch.stack([t.sum() for _, _, tensors in found for t in tensors]).sum().isfinite():
        for site, name, tensors in found:
            if not all(torch.isfinite(t).all() for t in tensors):
                raise NumericError(f"importance: the gradient moments of site '{site}' ({name}) are not finite.")
