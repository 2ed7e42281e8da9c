"""Top singular vectors and eigenvectors in float64, deterministic up to and including their signs."""

from __future__ import annotations

import torch

from ..errors import NumericError, UsageError
from ..importance.moments import wide

# Measured on two cores: the exact SVD of a 512 x 512 matrix takes .06 s, of 1024 x 1024 .4 s, of 1536 x 1536 1.2 s.
EXACT_UP_TO = 512
OVERSAMPLING = 16
# Squaring a matrix rounds away what is below 1e-8 of its largest singular value; at this share of it, the eigenvectors
# of the square are good to 1e-8.
FAINT = 1e-4
# On a Gaussian matrix, the flattest spectrum there is (1536 x 1536, r = 8), 8 blocks lose 5e-4 of the top-r energy;
# 8 power iterations that keep only the last block lose 2e-2, for the same number of products with the matrix.
KRYLOV_STEPS = 8
# eigh of a 1024 x 1024 matrix takes .5 s on a core, of 11008 x 11008 (the MLP of a 7B model) ten minutes. On a contrast
# of two spectra that fall like 1/n and share a direction 300 times as strong (1536 x 1536, r = 16), 8 blocks hold .9987
# of the sum of the top-r eigenvalues and 16 all of it, to 4 digits.
EIGH_UP_TO, EIGEN_STEPS = 1024, 16


def check_rank(matrix: torch.Tensor, rank: int) -> None:
    """Raise UsageError unless the matrix can have that rank."""
    if not 1 <= rank <= min(matrix.shape):
        raise UsageError(f"rank must be in [1, {min(matrix.shape)}], got {rank}")


def require_finite(matrix: torch.Tensor, what: str) -> torch.Tensor:
    """The matrix itself, or NumericError: LAPACK answers a NaN with an error that does not say where it came from."""
    if not torch.isfinite(matrix).all():
        raise NumericError(f"{what} has a non-finite value")
    return matrix


def align_signs(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flip pairs of columns of `u` (m, r) and `v` (n, r) so that the largest entry of each of `v`'s is positive."""
    signs = v.gather(0, v.abs().argmax(dim=0, keepdim=True)).sign()
    return u * signs, v * signs


def top_eigenvectors(symmetric: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors (n, r) of the r largest (not largest absolute) eigenvalues of `symmetric` (n, n), downwards.

    Exact where that is quick; else the best that a block Krylov space holds, which finds both ends of the spectrum.
    """
    check_rank(symmetric, rank)
    matrix, block = wide(require_finite(symmetric, "the second moment")), rank + OVERSAMPLING
    if len(matrix) > max(EIGH_UP_TO, block * (EIGEN_STEPS + 1)):
        basis = _symmetric_krylov_basis(matrix, block)
        vectors = basis @ torch.linalg.eigh(basis.T @ matrix @ basis).eigenvectors
    else:
        vectors = torch.linalg.eigh(matrix).eigenvectors
    vectors = vectors[:, -rank:].flip(1)  # eigh sorts upwards
    return align_signs(vectors, vectors)[1]


def top_singular(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The top singular triplets U (m, r), S (r,) downwards and V (n, r): matrix ~= U diag(S) V^T.

    Exact where that is quick; else the best that a block Krylov space holds (Musco and Musco, arXiv 1504.05477).
    """
    check_rank(matrix, rank)
    matrix = wide(matrix)
    width = (rank + OVERSAMPLING) * (KRYLOV_STEPS + 1)
    if min(matrix.shape) > max(EXACT_UP_TO, width):
        u, s, vt = _within(_krylov_basis(matrix, rank + OVERSAMPLING), matrix)
    else:
        u, s, vt = _by_gram_matrix(matrix, rank + OVERSAMPLING)
        if s[rank - 1] <= FAINT * s[0]:
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    u, v = align_signs(u[:, :rank], vt[:rank].T)
    return u, s[:rank], v


def _by_gram_matrix(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top triplets by the eigenvectors of the smaller of M M^T and M^T M: half the time of an SVD."""
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vt = _by_gram_matrix(matrix.T, count)
        return vt.T, s, u.T
    return _within(torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -count:], matrix)


def _within(basis: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The triplets of what is left of the matrix in the span of orthonormal columns (m, k).

    By QR before the SVD, which is then of (k, k): less than half the time for 216 x 4096 on a core.
    """
    q, r = torch.linalg.qr(matrix.T @ basis)
    u, s, vt = torch.linalg.svd(r.T, full_matrices=False)
    return basis @ u, s, vt @ q.T


def product_singular(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All singular triplets U, S (downwards) and V of left (m, r) @ right (r, n), signs as in `top_singular`.

    By QR of both factors and an SVD of the small core, so no (m, n) matrix is formed.
    """
    q_left, r_left = torch.linalg.qr(wide(left))
    q_right, r_right = torch.linalg.qr(wide(right).T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    u, v = align_signs(q_left @ u, q_right @ vt.T)
    return u, s, v


def _symmetric_krylov_basis(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """Orthonormal columns spanning M G, M^2 G, ..., each block made orthonormal before it grows; G is Gaussian.

    In float64 throughout: both sets share directions that outweigh the rest of their contrast by 1e8 (massive
    activations), beside which float32 would round the rest away.
    """
    blocks = [torch.linalg.qr(matrix @ _gaussian(matrix, block).double()).Q]
    for _ in range(EIGEN_STEPS):
        blocks.append(torch.linalg.qr(matrix @ blocks[-1]).Q)
    return torch.linalg.qr(torch.cat(blocks, dim=1)).Q


def _gaussian(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """Columns (n, block) to multiply a matrix (m, n) with, float32."""
    generator = torch.Generator().manual_seed(0)  # our own, so the result depends on nothing but the matrix
    return torch.randn(matrix.shape[1], block, generator=generator).to(matrix.device)


def _krylov_basis(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """Orthonormal columns spanning M G, (M M^T) M G, ..., each block made orthonormal before it grows; G is Gaussian.

    The blocks are float32, for speed: they only point at a subspace, and what is read off it is float64 again.
    """
    single = (matrix / matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)).float()  # a zero matrix stays zero
    blocks = [torch.linalg.qr(single @ _gaussian(matrix, block)).Q]
    for _ in range(KRYLOV_STEPS):
        blocks.append(torch.linalg.qr(single @ (single.T @ blocks[-1])).Q)
    return torch.linalg.qr(torch.cat(blocks, dim=1).double()).Q
