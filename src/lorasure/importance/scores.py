"""Moments -> importance of rows, columns and entries of each site. Pure tensors, no model.

The forget importance map of a site is M = score(forget) / score(retain), (out, in), elementwise. Only its row sums,
column sums and blocks are ever formed here; in LoRA and sketch space no (out, in) tensor is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from .moments import Moments, wide

ROWS_PER_BLOCK = 1024


@dataclass(frozen=True)
class ScoreRule:
    """How moments become a non-negative score per entry. `quadratic`: it scales with g^2, so sketches estimate it.
    `least`: examples of each set below which it says nothing.
    """

    title: str
    paper: str
    function: Callable[[Moments], Tensor]
    quadratic: bool
    least: int = 1


SCORES: dict[str, ScoreRule] = {
    "fisher": ScoreRule(
        "E[g^2], the Fisher information of FILA", "https://arxiv.org/abs/2408.06621", lambda m: m.second, True
    ),
    "variance": ScoreRule(
        "E[g^2] - E[g]^2, VILA's correction", "https://arxiv.org/abs/2508.21300", lambda m: m.variance, True, least=2
    ),
    # The paper names the next two (ExpILA, AbsILA) and gives no formula: these are our readings of the names.
    "expectation": ScoreRule("E[g]^2 (ExpILA)", "https://arxiv.org/abs/2508.21300", lambda m: m.mean.square(), True),
    "absolute": ScoreRule("E[|g|] (AbsILA)", "https://arxiv.org/abs/2508.21300", lambda m: m.absolute, False),
}


@dataclass(frozen=True)
class Space:
    """A gradient space: what is measured for a site, and how a score of it becomes the map's blocks."""

    title: str
    paper: str


SPACES: dict[str, Space] = {
    "full": Space(
        "gradients of W itself: exact, three float32 maps of the model's size per set",
        "https://arxiv.org/abs/2408.06621",
    ),
    "lora": Space(
        "gradients of LoRA factors: Var W ~ Var B @ Var A (VILA, Theorem 1)", "https://arxiv.org/abs/2508.21300"
    ),
    "sketch": Space(
        "random sketches of W's gradient from LoRA gradients with one factor at zero: unbiased row and column energies",
        "https://arxiv.org/abs/2508.21300",
    ),
}


@dataclass(frozen=True)
class Weights:
    """Importance of one site's rows, columns and entries (by block). float64; only ratios within a site matter.

    rows (out,): row sums of the map. columns (in,): column sums over the grand total, so that rows x columns is the
    map's best rank-one approximation in Kullback-Leibler divergence. mean: the map's mean entry, for ranking sites.
    """

    rows: Tensor
    columns: Tensor
    mean: float
    block: Callable[[int, int], Tensor]


def site_weights(
    score: str, space: str, forget: Mapping[str, Moments], retain: Mapping[str, Moments], floor: float | None = None
) -> Weights:
    """Weights of one site from its moments on the two sets (factor name -> Moments).

    `floor`: added to the retain score before the division; None is our default, a relative floor (see `ratio`), a
    number is the published code's absolute epsilon.
    """
    rule = SCORES[score]
    check_pair(score, space)
    top = {name: wide(rule.function(m)) for name, m in forget.items()}
    bottom = {name: wide(rule.function(m)) for name, m in retain.items()}
    if space == "sketch":
        return _sketch_weights(top, bottom)
    shape = top["W"].shape if space == "full" else (top["B"].shape[0], top["A"].shape[1])

    def blocks(score: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
        return score["W"][start:stop] if space == "full" else score["B"][start:stop] @ score["A"]

    scale = _mean_of(lambda a, b: blocks(bottom, a, b), shape)

    def block(start: int, stop: int) -> Tensor:
        return ratio(blocks(top, start, stop), blocks(bottom, start, stop), scale, floor)

    rows, columns = torch.zeros(shape[0], dtype=torch.float64), torch.zeros(shape[1], dtype=torch.float64)
    for start in range(0, shape[0], ROWS_PER_BLOCK):
        part = block(start, start + ROWS_PER_BLOCK)
        rows[start : start + ROWS_PER_BLOCK] = part.sum(1).cpu()
        columns += part.sum(0).cpu()
    total = rows.sum()
    return Weights(rows, columns / total if total > 0 else columns, float(total) / (shape[0] * shape[1]), block)


def check_pair(score: str, space: str) -> None:
    """A sketch preserves sums of squares, not of absolute values."""
    if space == "sketch" and not SCORES[score].quadratic:
        choices = ", ".join(name for name, rule in SCORES.items() if rule.quadratic)
        raise UsageError(f"--score {score} cannot be estimated with --space sketch. Choose one of: {choices}.")


def ratio(top: Tensor, bottom: Tensor, scale: float, floor: float | None) -> Tensor:
    """Elementwise top / bottom, finite for every finite input.

    The published code adds 1e-5 to the denominator, which is far above the scores themselves (1e-9 .. 1e-19 in small
    models), so that the retain set is in effect ignored. Here the denominator is bounded below by the rounding error
    of the moments, float32's epsilon times their mean `scale`, so that the unit of the scores cancels. A site that the
    retain set never reaches (scale 0) is bounded by the smallest product of two normal moments (LoRA space multiplies
    two), which keeps the order of its entries and ranks the site first.
    """
    if floor is not None:
        return top / (bottom + floor)
    info = torch.finfo(torch.float32)
    return top / bottom.clamp_min(info.eps * scale if scale > 0 else info.tiny**2)


def _mean_of(blocks: Callable[[int, int], Tensor], shape: tuple[int, ...]) -> float:
    total = sum(float(blocks(a, a + ROWS_PER_BLOCK).sum()) for a in range(0, shape[0], ROWS_PER_BLOCK))
    return total / (shape[0] * shape[1])


def _sketch_weights(top: Mapping[str, Tensor], bottom: Mapping[str, Tensor]) -> Weights:
    """Ratios of row and column energies, in the unit of the map's sums; entry (i, j) is taken as rows_i * columns_j.

    Departs from the map's row sums: in * sum_j F_ij / sum_j R_ij instead of sum_j F_ij / R_ij, which no single small
    denominator can dominate.
    """
    energies = {
        "rows": (top["rows"].sum(1), bottom["rows"].sum(1)),
        "columns": (top["columns"].sum(0), bottom["columns"].sum(0)),
    }
    rows, columns = (ratio(f, r, float(r.mean()), None).cpu() for f, r in energies.values())
    total = columns.sum()
    columns = columns / total if total > 0 else columns
    mean, rows = float(rows.mean()), rows * len(columns)
    return Weights(rows, columns, mean, lambda a, b: torch.outer(rows[a:b], columns))


def choose_sites(means: Mapping[str, float], coverage: float) -> list[str]:
    """The names of the top `coverage` share of sites by mean importance (at least one), in their given order.

    VILA's Table 10: 25 % of the layers did better than all of them for every loss.
    """
    keep = max(1, round(coverage * len(means)))
    chosen = set(sorted(means, key=lambda name: -means[name])[:keep])
    return [name for name in means if name in chosen]
