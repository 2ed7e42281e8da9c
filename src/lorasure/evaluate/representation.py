"""How alike two models are inside: linear CKA of their hidden states on the same examples. No model and no tensor here.

The hidden states are those of inside.layer_means: one vector per example and layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import DataError, NumericError
from .evaluation import Evaluation
from .metrics import Score

LEAST = 3  # rows; the alignment of two is always 1


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of `x` (n, p) and `y` (n, q), rows in the same order; in [0, 1].

    |Yc' Xc|^2 / (|Xc' Xc| |Yc' Yc|) with Frobenius norms and centred columns (arXiv 1905.00414). 1 if one is a
    rotation, a scaling or a shift of the other. Chance alone gives p / (n + p) or so where p = q: compare values of
    equal n only. DataError below 3 rows (two always give 1), NumericError where all rows of one are the same.
    """
    return float(_aligned(x, y)[0])


def cka_score(x: np.ndarray, y: np.ndarray) -> Score:
    """`cka` with n and a 95 % interval, value +- 1.96 standard errors of the jackknife, held within [0, 1].

    Not a bootstrap: a row drawn twice is alike in both models and would raise every draw. No interval below 4 rows,
    where leaving one out always gives 1.
    """
    found = _aligned(x, y)
    value, without, n = float(found[0]), found[1:], len(found) - 1
    if n < 4 or not np.isfinite(without).all():
        return Score(value, n)
    half = 1.96 * np.sqrt((n - 1) * without.var())
    return Score(value, n, max(0.0, value - half), min(1.0, value + half))


def layer_similarity(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> list[Score]:
    """`cka_score` per layer, the embeddings first; a layer that does not tell any rows apart is undefined.

    Below LEAST rows one that says so stands for all.
    """
    scores = []
    if len(before[0]) < LEAST:
        return [Score(None, len(before[0]), reason=f"it takes {LEAST} rows: two are always alike")]
    for index, (x, y) in enumerate(zip(before, after, strict=True)):
        try:
            scores.append(cka_score(x, y))
        except NumericError as error:
            scores.append(Score(None, len(x), reason=f"layer {index}: {error}"))
    return scores


def similarity(evaluation: Evaluation, reference: Evaluation | None) -> dict[str, Score]:
    """`SET_cka_original` and `SET_cka_retrained`: CKA of the layer least alike, that of all of them in `layers`.

    Against the same model without its adapter, and against the retrained reference, where the hidden states of both
    were kept.
    """
    found = {}
    for name in [name for name in evaluation.sets if name in evaluation.hidden]:
        others = {"original": evaluation.hidden.get(f"{name} original")}
        others["retrained"] = reference.hidden.get(name) if reference else None
        for which, other in others.items():
            if other is not None and other.shape[:2] == evaluation.hidden[name].shape[:2]:
                found[f"{name}_cka_{which}"] = _least(layer_similarity(other, evaluation.hidden[name]))
    return found


def _least(layers: Sequence[Score]) -> Score:
    """The lowest of the layers' scores, with all values; undefined layers are passed over unless all are."""
    defined = [score for score in layers if score.value is not None]
    if not defined:
        return layers[0]
    least = min(defined, key=lambda score: float(score.value or 0))
    return replace(least, extra={"layers": [score.value for score in layers]})


def _aligned(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """CKA of all rows, then without each row in turn, (1 + n,); nan where leaving a row out leaves equal rows."""
    k, m = _gram(x), _gram(y)
    if len(k) != len(m):
        raise DataError(f"expected as many rows in both, got {len(k)} and {len(m)}.")
    with np.errstate(invalid="ignore"):
        return np.clip(_dependence(k, m) / np.sqrt(_dependence(k, k) * _dependence(m, m)), 0, 1)


def _gram(x: np.ndarray) -> np.ndarray:
    """Products of the centred rows, (n, n) float64; its rows and columns sum to 0."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < LEAST:
        raise DataError(f"expected hidden states (n, width) with n of {LEAST} at least, got shape {x.shape}.")
    if not np.isfinite(x).all():
        raise NumericError("hidden states must be finite.")
    if (x == x[0]).all():
        raise NumericError("all rows are the same; alignment is undefined.")
    centred = x - x.mean(axis=0)
    return centred @ centred.T


def _dependence(k: np.ndarray, m: np.ndarray) -> np.ndarray:
    """trace(K H M H), H the centring matrix, of all rows and without each row in turn, (1 + n,).

    The row sums of centred K and M vanish, so those of the n - 1 rows that stay are minus the column that went. To
    centre anew, 2/(n - 1) of the products of these columns come off and 1/(n - 1)^2 of those of the diagonals go on.
    """
    products = k * m
    rows, diagonal, left = products.sum(axis=1), products.diagonal(), len(k) - 1
    without = rows.sum() - 2 * rows + diagonal - 2 * (rows - diagonal) / left + diagonal / left**2
    return np.append(rows.sum(), without)
