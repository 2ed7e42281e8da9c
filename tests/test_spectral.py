"""Top eigenvectors by a Krylov space: as good as exact ones where those take minutes."""

from __future__ import annotations

import pytest
import torch

from lorasure.init import spectral
from lorasure.init.spectral import top_eigenvectors

SIZE, RANK = 300, 6


def orthonormal(size, seed):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()).Q


def contrast(size=SIZE):
    """A symmetric matrix with a slowly falling spectrum, and one negative eigenvalue that outweighs all others."""
    q = orthonormal(size, 0)
    values = torch.arange(1, size + 1, dtype=torch.float64).reciprocal()
    values[size // 2 :] *= -1
    values[-1] = -1e8  # a massive activation that both sets have
    return q @ torch.diag(values) @ q.T


@pytest.fixture
def never_exact(monkeypatch):
    monkeypatch.setattr(spectral, "EIGH_UP_TO", 0)
    monkeypatch.setattr(spectral, "EIGEN_STEPS", 10)


def captured(matrix, vectors):
    return float((vectors.T @ matrix @ vectors).trace())


def test_a_krylov_space_holds_the_largest_eigenvalues_beside_a_huge_negative_one(never_exact):
    matrix = contrast()
    best = float(torch.linalg.eigvalsh(matrix)[-RANK:].sum())
    found = top_eigenvectors(matrix, RANK)
    torch.testing.assert_close(found.T @ found, torch.eye(RANK).double())
    assert captured(matrix, found) > 0.999 * best


def test_in_float32_they_would_be_lost(never_exact, monkeypatch):
    def single(matrix, block):
        blocks = [torch.linalg.qr(matrix.float() @ spectral._gaussian(matrix, block)).Q]
        for _ in range(spectral.EIGEN_STEPS):
            blocks.append(torch.linalg.qr(matrix.float() @ blocks[-1]).Q)
        return torch.linalg.qr(torch.cat(blocks, dim=1).double()).Q

    matrix = contrast()
    best = float(torch.linalg.eigvalsh(matrix)[-RANK:].sum())
    monkeypatch.setattr(spectral, "_symmetric_krylov_basis", single)
    assert captured(matrix, top_eigenvectors(matrix, RANK)) < 0.99 * best


def test_the_same_matrix_gives_the_same_bytes_and_small_ones_are_exact(never_exact):
    matrix = contrast()
    assert torch.equal(top_eigenvectors(matrix, RANK), top_eigenvectors(matrix, RANK))
    small = contrast(40)
    exact = torch.linalg.eigh(small).eigenvectors[:, -RANK:].flip(1)
    torch.testing.assert_close((top_eigenvectors(small, RANK) * exact).sum(0).abs(), torch.ones(RANK).double())
