"""Low-rank parts of one weight matrix: which rank-r product to hand to LoRA, and how to split it. No model here.

A solver returns a `Product` (left @ right); a function of SPLITS turns it into `Factors`, scaling * B @ A = product.
The weight W is (out, in). Everything is computed and returned in float64, as importance weights may span many orders
of magnitude, so that the caller rounds the factors once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..importance.moments import wide
from .spectral import check_rank, product_singular, require_finite, top_eigenvectors, top_singular

WeightRows = Callable[[int, int], torch.Tensor]

BLOCK_ENTRIES = 2**22  # float64 numbers in one temporary of `elementwise`: 32 MiB


@dataclass(frozen=True)
class Product:
    """A rank-r matrix as `left` (out, r) @ `right` (r, in), one component per column.

    `strength` (r,): the singular values of the weighted W that the components come from, the weights as given
    (not normalised). Only the published split looks at it.
    """

    left: torch.Tensor
    right: torch.Tensor
    strength: torch.Tensor


@dataclass(frozen=True)
class Factors:
    """LoRA factors `B` (out, r) and `A` (r, in); they stand for scaling * B @ A."""

    B: torch.Tensor
    A: torch.Tensor


def rows(weight: torch.Tensor, row_weights: torch.Tensor, rank: int) -> Product:
    """Minimise sum_i d_i ||W_i - P_i||^2 over P of rank r; d = `row_weights` (out,), at least 0, in any unit.

    P = W V V^T, with V the top right singular vectors of diag(sqrt d) W: what FILA (arXiv 2408.06621) and VILA
    (2508.21300) compute from the row sums of their map. They divide by sqrt d at the end; nothing is divided here, so a
    row of weight 0 is simply projected like the others. d = 1 gives PiSSA's product (2404.02948).
    """
    weight = _checked(weight)
    root, unit = _root(row_weights, weight, 0)
    _, s, v = top_singular(root[:, None] * weight, rank)
    return Product(weight @ v, v.T, s * unit)


def rows_and_columns(
    weight: torch.Tensor, row_weights: torch.Tensor, column_weights: torch.Tensor, rank: int
) -> Product:
    """Minimise sum_ij u_i v_j (W - P)_ij^2 over P of rank r; u = `row_weights` (out,), v = `column_weights` (in,).

    With U S V^T the top of diag(sqrt u) W diag(sqrt v), P = diag(1/sqrt u) U S V^T diag(1/sqrt v). It is computed as
    L R^T with L = W diag(sqrt v) V and R = W^T diag(sqrt u) U / S: equal, but without dividing by a weight, so that
    weights of 0 need no floor. Components whose S is 0 to rounding carry nothing and are left at zero.
    """
    weight = _checked(weight)
    root_u, unit_u = _root(row_weights, weight, 0)
    root_v, unit_v = _root(column_weights, weight, 1)
    u, s, v = top_singular(root_u[:, None] * weight * root_v, rank)
    left = weight @ (root_v[:, None] * v)
    right = (weight.T @ (root_u[:, None] * u)).T * _inverse(s)[:, None]
    return Product(left * (_inverse(s) > 0), right, s * unit_u * unit_v)


def elementwise(
    weight: torch.Tensor, element_weights: torch.Tensor | WeightRows, rank: int, *, sweeps: int = 10
) -> Product:
    """Lower sum_ij w_ij (W - P)_ij^2 over P of rank r by alternating least squares, from the solution of `rows`.

    `element_weights` is (out, in), at least 0, or a function (start, stop) -> those of its rows, so that the map need
    not be held. Each half sweep solves one side exactly, in float64, so the objective never increases; a sweep that
    does not lower it (rounding) is undone and ends the search. The result is a local optimum: the problem is NP-hard.
    Memory: blocks of 32 MiB, and in * r^2 numbers for the right-hand side's normal equations.
    """
    weight = _checked(weight)
    if isinstance(element_weights, torch.Tensor) and element_weights.shape != weight.shape:
        raise ValueError(
            f"expected weights {tuple(weight.shape)} like the weight matrix, got {tuple(element_weights.shape)}"
        )
    blocks = _Blocks(weight, element_weights, rank)
    row_weights = torch.cat([_nonnegative(w).sum(1) for _, _, w in blocks])
    start = rows(weight, row_weights, rank)
    left, right = start.left, start.right
    best = _objective(blocks, left, right)
    for _ in range(sweeps):
        new_left = _solve_left(blocks, left, right)
        new_right = _solve_right(blocks, new_left, right)
        value = _objective(blocks, new_left, new_right)
        if not value < best:
            break
        left, right, best = new_left, new_right, value
    return _principal(left, right, row_weights)


class _Blocks:
    """Row blocks (slice, W rows, weight rows) in float64, small enough to bound memory; read once per half sweep."""

    def __init__(self, weight: torch.Tensor, element_weights: torch.Tensor | WeightRows, rank: int) -> None:
        self.weight, self.element_weights = weight, element_weights
        self.height = max(1, BLOCK_ENTRIES // (weight.shape[1] * max(1, rank)))

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        for start in range(0, self.weight.shape[0], self.height):
            part = slice(start, min(start + self.height, self.weight.shape[0]))
            if isinstance(self.element_weights, torch.Tensor):
                w = self.element_weights[part]
            else:
                w = self.element_weights(part.start, part.stop)
            yield part, self.weight[part], w.to(self.weight.device, torch.float64)


def _objective(blocks: _Blocks, left: torch.Tensor, right: torch.Tensor) -> float:
    return sum(float((w * (target - left[part] @ right) ** 2).sum()) for part, target, w in blocks)


def _solve_left(blocks: _Blocks, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    new = left.clone()
    for part, target, w in blocks:
        gram = (w[:, None, :] * right) @ right.T
        slope = (w * (target - left[part] @ right)) @ right.T
        new[part] += _newton_step(gram, slope)
    return new


def _solve_right(blocks: _Blocks, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    rank, columns = right.shape
    gram, slope = right.new_zeros(columns, rank * rank), right.new_zeros(columns, rank)
    for part, target, w in blocks:
        own = left[part]
        gram += w.T @ (own[:, :, None] * own[:, None, :]).flatten(1)
        slope += (w * (target - own @ right)).T @ own
    return right + _newton_step(gram.view(columns, rank, rank), slope).T


def _newton_step(gram: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """The step to the minimum of each quadratic, (n, r), from `gram` (n, r, r) and minus half the slope (n, r).

    Steps instead of solutions, and a pseudo-inverse: where the weights leave a row or a direction free, it stays as is.
    """
    return (torch.linalg.pinv(gram, hermitian=True) @ slope[:, :, None]).squeeze(-1)


def _principal(left: torch.Tensor, right: torch.Tensor, row_weights: torch.Tensor) -> Product:
    """The same product in the form that `rows` gives: orthonormal rows on the right, strengths from diag(sqrt d)."""
    root, unit = _root(row_weights, left, 0)
    q, t = torch.linalg.qr(right.T)
    left = left @ t.T
    _, s, z = top_singular(root[:, None] * left, left.shape[1])
    return Product(left @ z, (q @ z).T, s * unit)


def balanced(product: Product, scaling: float) -> Factors:
    """Split evenly, B^T B = A A^T diagonal: both factors learn at the same pace. Independent of the weights' unit."""
    _check_scaling(scaling)
    u, s, v = product_singular(product.left, product.right)
    root = (s / scaling).sqrt()
    return Factors(u * root, (v * root).T.contiguous())


def published(product: Product, scaling: float) -> Factors:
    """The split of FILA's and VILA's code: A = sqrt(S / s) V^T, B = diag(1/sqrt d) U sqrt(S / s), S unnormalised.

    So a constant factor on the weights changes the split (and with it the pace of learning) but not the product. B is
    computed as W V / sqrt(S s), the same without dividing by d. Components with S = 0 to rounding get B = 0.
    """
    _check_scaling(scaling)
    root = (product.strength / scaling).sqrt()
    inverse = (_inverse(product.strength) / scaling).sqrt()
    return Factors(product.left * inverse, root[:, None] * product.right)


SPLITS: dict[str, Callable[[Product, float], Factors]] = {"balanced": balanced, "published": published}


@dataclass(frozen=True)
class Solver:
    """A row of SOLVERS. The function's parameters between `weight` and `rank` say which weights it takes."""

    title: str
    paper: str
    function: Callable[..., Product]


SOLVERS: dict[str, Solver] = {
    "rows": Solver("Row-weighted SVD", "https://arxiv.org/abs/2408.06621", rows),
    "rows-and-columns": Solver("Row- and column-weighted SVD", "https://arxiv.org/abs/2408.06621", rows_and_columns),
    "elementwise": Solver("Weighted low-rank approximation", "https://arxiv.org/abs/2408.06621", elementwise),
}


def published_rows(weight: torch.Tensor, row_weights: torch.Tensor, rank: int, scaling: float, seed: int) -> Factors:
    """The arithmetic of FILA's and VILA's public code, to check published numbers; `rows` is the correct form.

    q = sqrt(d) with d = `row_weights` (out,); a randomised SVD of diag(q) W without oversampling and with two power
    iterations; A = sqrt(S / s) V^T, B = diag(1 / (q + 1e-5)) U sqrt(S / s). Two known errors are kept: the SVD misses
    energy, and the 1e-5 shrinks B where q is not far above it, so s B A is not the minimiser.
    Computed in W's dtype, as published.
    """
    _check_scaling(scaling)
    check_rank(weight, rank)
    q = _nonnegative(row_weights).sqrt().to(weight)
    # The SVD draws from the global generator; the fork gives the caller's state back.
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(q[:, None] * weight, q=rank, niter=2)
    root = (s / scaling).sqrt()
    return Factors((u * root) / (q + 1e-5)[:, None], (v * root).T.contiguous())


def contrast_directions(forget: torch.Tensor, retain: torch.Tensor, rank: int, *, balance: float = 0.7) -> torch.Tensor:
    """Top-r eigenvectors (n, r) of (1 - b) C_f - b C_r with b = `balance`: strong on forget, weak on retain.

    `forget` and `retain` (n, n) are second moments: the sum of x x^T over tokens, divided by the number of tokens, for
    both sets alike, as nothing is normalised here. ReGLU (arXiv 2604.17396) takes b = .7 for TOFU and .5 for WMDP.
    """
    if not 0 <= balance <= 1:
        raise UsageError(f"balance must be in [0, 1], got {balance}")
    return top_eigenvectors((1 - balance) * wide(forget) - balance * wide(retain), rank)


def regulariser_basis(retain: torch.Tensor, k: int = 128) -> torch.Tensor:
    """Top min(k, n) eigenvectors (n, k) of the retain outputs' second moment (n, n): ReGLU's P in .5 ||B^T P||^2."""
    return top_eigenvectors(retain, min(k, retain.shape[0]))


def factors_on_outputs(weight: torch.Tensor, directions: torch.Tensor, scaling: float) -> Factors:
    """ReGLU's start, the part of W that writes to orthonormal Q = `directions` (out, r): B = Q, A = Q^T W / s."""
    _check_scaling(scaling)
    q = wide(directions)
    return Factors(q, q.T @ _checked(weight) / scaling)


def factors_on_inputs(weight: torch.Tensor, directions: torch.Tensor, scaling: float) -> Factors:
    """The part of W that reads from P = `directions` (in, r), ours and not the paper's: A = P^T, B = W P / s."""
    _check_scaling(scaling)
    p = wide(directions)
    return Factors(_checked(weight) @ p / scaling, p.T.contiguous())


def _checked(weight: torch.Tensor) -> torch.Tensor:
    if weight.ndim != 2:
        raise ValueError(f"expected a weight (out, in), got shape {tuple(weight.shape)}")
    return wide(require_finite(weight, "the weight"))


def _check_scaling(scaling: float) -> None:
    if not scaling > 0:
        raise UsageError(f"scaling must be above 0, got {scaling}")


def _nonnegative(weights: torch.Tensor) -> torch.Tensor:
    weights = wide(weights)
    if not (torch.isfinite(weights) & (weights >= 0)).all():
        raise ValueError("importance weights must be finite and at least 0")
    return weights


def _root(weights: torch.Tensor, matrix: torch.Tensor, side: int) -> tuple[torch.Tensor, float]:
    """sqrt of `weights` over their largest, (n,), and sqrt of that largest; all-zero weights count as uniform."""
    if weights.shape != matrix.shape[side : side + 1]:
        raise ValueError(f"expected {matrix.shape[side]} weights, got shape {tuple(weights.shape)}")
    weights = _nonnegative(weights).to(matrix.device)
    largest = float(weights.max())
    if largest == 0:
        return torch.ones_like(weights), 1.0
    return (weights / largest).sqrt(), largest**0.5


def _inverse(s: torch.Tensor) -> torch.Tensor:
    """1 / s, and 0 where s is rounding: an SVD in float64 has an absolute error of some eps times its largest value."""
    floor = 100 * torch.finfo(s.dtype).eps * s.max()
    return torch.where(s > floor, 1 / s, 0)
