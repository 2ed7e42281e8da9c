"""A bigram model of some answers: what comes next for one who knows how they are written, and nothing that they say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.examples import Example


@dataclass(frozen=True)
class Bigrams:
    """P(t | s) of a token t after a token s, smoothed as by Witten and Bell (https://doi.org/10.1109/18.87000).

    A token that s was seen before k different others n times gives k / (n + k) to P(t), how often tokens come at all;
    of that, as much goes to all V tokens alike by the same rule. So no token is impossible.

    `counts` (V, V), sparse: how often a column came after a row. `often` (V,): P(t).
    """

    counts: Tensor
    often: Tensor

    @classmethod
    def of(cls, examples: Iterable[Example], vocabulary: int, device: torch.device | str = "cpu") -> Bigrams:
        """Of the answers of `examples`; the token before an answer's first is the last of its prompt."""
        rows = [torch.tensor(e.input_ids[e.first - 1 :]) for e in examples]
        pairs = torch.cat([torch.stack([row[:-1], row[1:]]) for row in rows], dim=1)
        ones, size = torch.ones(pairs.shape[1]), (vocabulary, vocabulary)
        counts = torch.sparse_coo_tensor(pairs, ones, size, check_invariants=True).coalesce()
        alone = torch.bincount(pairs[1], minlength=vocabulary).float()
        return cls(counts.to(device), smoothed(alone, torch.full_like(alone, 1 / vocabulary)).to(device))

    def log_probs(self, previous: Tensor) -> Tensor:
        """log P (n, V) in nats of what comes after `previous` (n,)."""
        return smoothed(self.counts.index_select(0, previous).to_dense(), self.often).log_()


def smoothed(counts: Tensor, otherwise: Tensor) -> Tensor:
    """Shares of `counts` (..., V), mixed with `otherwise` (V,) by how many kinds there are among them."""
    kinds = (counts > 0).sum(-1, keepdim=True).clamp_min(1)
    return torch.addcmul(counts, kinds, otherwise).div_(counts.sum(-1, keepdim=True) + kinds)
