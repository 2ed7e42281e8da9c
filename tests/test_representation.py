"""Linear CKA against its definition by kernels, its invariances, and a jackknife done the slow way."""

from __future__ import annotations

import numpy as np
import pytest

from lorasure.errors import DataError, NumericError
from lorasure.evaluate.representation import cka, cka_score, layer_similarity

RNG = np.random.default_rng(0)
X, NOISE = RNG.normal(size=(40, 6)), RNG.normal(size=(40, 9))
Y = X @ RNG.normal(size=(6, 9)) + 2 * NOISE


def kernel_cka(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with HSIC = trace(K H L H) / (n - 1)^2."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return np.trace(a @ a.T @ h @ b @ b.T @ h) / (n - 1) ** 2

    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def test_both_published_forms_agree() -> None:
    """References: the kernel form, and the feature form |Yc'Xc|^2 / (|Xc'Xc| |Yc'Yc|)."""
    value = cka(X + 3, Y)
    assert 0.1 < value < 0.9 and value == pytest.approx(kernel_cka(X, Y), rel=1e-10)
    x, y = X - X.mean(0), Y - Y.mean(0)
    norm = np.linalg.norm
    assert value == pytest.approx(norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y)), rel=1e-10)


def test_rotation_scaling_and_shift_change_nothing_and_other_maps_do() -> None:
    rotation = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    assert cka(X, X) == pytest.approx(1) == cka(X, -7 * X @ rotation + 100)
    assert cka(X @ rotation, 1e-6 * Y) == pytest.approx(cka(X, Y)) == cka(Y, X)
    assert cka(X, X @ np.diag([10, 1, 1, 1, 1, 1])) < 0.8


def test_chance_gives_what_the_docstring_says() -> None:
    for n, p in ((200, 20), (50, 100)):
        values = [cka(RNG.normal(size=(n, p)), RNG.normal(size=(n, p))) for _ in range(10)]
        assert np.mean(values) == pytest.approx(p / (n + p), rel=0.15)


def test_the_interval_is_the_jackknife() -> None:
    """Reference: CKA computed anew without each row in turn."""
    score = cka_score(X, Y)
    without = np.array([kernel_cka(np.delete(X, i, 0), np.delete(Y, i, 0)) for i in range(40)])
    error = np.sqrt(39 / 40 * ((without - without.mean()) ** 2).sum())
    assert score.value == pytest.approx(cka(X, Y)) and score.n == 40
    assert (score.low, score.high) == pytest.approx((score.value - 1.96 * error, score.value + 1.96 * error), rel=1e-8)
    exact = cka_score(X, 2 * X)
    assert (exact.low, exact.value, exact.high) == pytest.approx((1, 1, 1))


def test_the_jackknife_error_is_the_spread_over_new_samples() -> None:
    """Reference: the standard deviation of CKA over 200 fresh samples from one distribution."""
    mix = RNG.normal(size=(3, 3))
    values, widths = [], []
    for _ in range(200):
        x = RNG.normal(size=(80, 3))
        score = cka_score(x, x @ mix + RNG.normal(size=(80, 3)))
        values.append(score.value)
        widths.append((score.high - score.low) / (2 * 1.96))
    assert np.mean(widths) == pytest.approx(np.std(values), rel=0.25)


def test_what_is_undefined_is_said() -> None:
    with pytest.raises(NumericError, match="all rows are the same"):
        cka(np.ones((5, 2)) * 0.1, X[:5])
    with pytest.raises(DataError, match="n of 3 at least"):
        cka(X[:2], Y[:2])
    [few] = layer_similarity([X[:2]] * 3, [Y[:2]] * 3)
    assert few.value is None and few.n == 2 and few.reason == "it takes 3 rows: two are always alike"
    with pytest.raises(DataError, match="as many rows in both, got 40 and 39"):
        cka(X, Y[1:])
    with pytest.raises(NumericError, match="finite"):
        cka(np.where(X > 2, np.nan, X), Y)
    assert cka_score(X[:3], Y[:3]).low is None
    layers = layer_similarity([np.ones((40, 2)), X], [X, Y])
    assert layers[0].value is None and "layer 0: all rows are the same" in str(layers[0].reason)
    assert layers[1] == cka_score(X, Y)
    alike = np.eye(5)[[0, 0, 0, 0, 1]]  # without its last row nothing is left to compare
    assert cka_score(alike, alike).value == pytest.approx(1)
