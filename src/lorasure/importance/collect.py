"""Model + batches -> moments of per-example gradients, by hooks, in one forward and one backward pass.

For one example with layer inputs X (tokens, in) and output gradients D (tokens, out), the gradient of W is D^T X. With
LoRA factors B (out, k), A (k, in) added in such a way that the model's function does not change, the factors' gradients
are s D^T (X A^T) and s (D B)^T X of the *unchanged* X and D. So no adapter is built, no weight needs a gradient, and
the model measured is exactly the model. The published code adds its random probe to the model uncompensated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import processes
from ..data.examples import Example, collate, micro_batches
from ..errors import NumericError, UsageError
from ..forward import Progress, answer_logits
from ..precision import operand, product
from ..sites import Site, tap
from .moments import Moments

FULL_CHUNK = 2**24  # elements of per-example full gradients held at once
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

    def shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        """Factor name -> shape of its gradient, as `per_example` gives them."""
        out, features = site.shape
        if self.space == "full":
            return {"W": site.shape}
        left, right = ("B", "A") if self.space == "lora" else ("rows", "columns")
        return {left: (out, self.rank), right: (self.rank, features)}


def per_example(probe: Probe, factors: dict[str, Tensor], x: Tensor, d: Tensor) -> Iterable[dict[str, Tensor]]:
    """Per-example gradients (examples, ...) of one site from x (examples, tokens, in) and d (examples, tokens, out).

    Yields one dictionary, or several over chunks of examples in `full` space, where a gradient is as large as W.
    """
    x, d = operand(x), operand(d)
    if probe.space == "full":
        step = max(1, FULL_CHUNK // (x.shape[-1] * d.shape[-1]))
        for start in range(0, len(x), step):
            yield {"W": product(d[start : start + step].mT, x[start : start + step])}
        return
    a, b = (factors[name].to(x.dtype) for name in "AB")
    # Always k rows times many columns: several times as fast as many rows times k columns.
    left = product((x @ a.T).mT, d).mT
    if x.is_cuda:  # half the time there, where a number of tokens that is no multiple of 8 has slow kernels
        right = product((d @ b).mT, x)
    else:
        right = product((b.T @ d.flatten(0, 1).T).unflatten(1, d.shape[:2]).transpose(0, 1), x)
    if probe.space == "lora":
        yield {"B": probe.scaling * left, "A": probe.scaling * right}
    else:
        yield {"rows": left, "columns": right}


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
    device = model.device
    factors = {site.name: probe.factors(site, device) for site in sites}
    result: SetMoments = {}

    def observe(site: Site, x: Tensor, d: Tensor) -> None:
        for values in per_example(probe, factors[site.name], x, d):
            kept = result.setdefault(site.name, {})
            for name, value in values.items():
                kept.setdefault(name, Moments.empty(value.shape[1:], device)).update(value)

    with tap(model, sites, backward=observe):
        for group in processes.share(micro_batches([len(e) for e in examples], token_budget)):
            batch = [examples[i] for i in group]
            backward(model, batch)
            if progress:
                progress(len(batch) * processes.size())
    _add_up(result, sites, probe, device)
    _complete(result, sites, probe, len(examples), device)
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


def _add_up(result: SetMoments, sites: Sequence[Site], probe: Probe, device: torch.device) -> None:
    """Over all processes, in the order of the sites, as every process must come to every sum."""
    if processes.size() == 1:
        return
    for site in sites:
        kept = result.setdefault(site.name, {})
        for name, shape in probe.shapes(site).items():
            kept.setdefault(name, Moments.empty(shape, device)).add_up()


def _complete(result: SetMoments, sites: Sequence[Site], probe: Probe, count: int, device: torch.device) -> None:
    """Count the examples that never reached a site (an expert) as gradients of zero, or the mean would be too large."""
    for site in sites:
        if site.name not in result:
            result[site.name] = {name: Moments.empty(shape, device) for name, shape in probe.shapes(site).items()}
        for kept in result[site.name].values():
            missing = count - kept.count
            if missing < 0:
                raise UsageError(
                    f"Layer '{site.name}' is used more than once per pass, so its gradients come in parts and cannot "
                    "be measured; leave it out with --exclude."
                )
            if missing:
                zeros = torch.zeros_like(kept.mean)
                kept.merge(Moments(missing, zeros, zeros.clone(), zeros.clone()))


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
