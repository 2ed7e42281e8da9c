"""Weighted low-rank solvers against independent optimisers, and each guard shown to be able to fail."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasure.errors import NumericError, UsageError
from lorasure.init.low_rank import (
    SOLVERS,
    SPLITS,
    balanced,
    contrast_directions,
    elementwise,
    factors_on_inputs,
    factors_on_outputs,
    published,
    published_rows,
    regulariser_basis,
    rows,
    rows_and_columns,
)
from lorasure.init.spectral import top_singular

OUT, IN, RANK, SCALING = 14, 11, 3, 2.0


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(*shape, seed=1, spread=2.0):
    """Positive weights over some orders of magnitude."""
    return (spread * random(*shape, seed=seed)).exp()


def dense(product):
    return product.left @ product.right


def objective(weight, approximation, element_weights):
    return (element_weights * (weight - approximation) ** 2).sum()


def descend(weight, element_weights, rank, seed, steps=3000):
    """The weighted problem by L-BFGS on random factors: shares nothing with the solvers but the objective."""
    factors = [random(weight.shape[0], rank, seed=seed), random(rank, weight.shape[1], seed=seed + 1)]
    factors = [f.requires_grad_() for f in factors]
    optimiser = torch.optim.LBFGS(
        factors,
        max_iter=steps,
        history_size=50,
        tolerance_grad=1e-14,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        value = objective(weight, factors[0] @ factors[1], element_weights)
        value.backward()
        return value

    optimiser.step(closure)
    return objective(weight, factors[0] @ factors[1], element_weights).item()


def relative_slope(weight, product, element_weights):
    """Gradient of the objective in both factors, over what a factor of zero would give: 0 at an optimum."""
    left, right = product.left.clone().requires_grad_(), product.right.clone().requires_grad_()
    objective(weight, left @ right, element_weights).backward()
    full = element_weights * weight
    return max(
        (left.grad.norm() / (full @ right.detach().T).norm()).item(),
        (right.grad.norm() / (left.detach().T @ full).norm()).item(),
    )


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_reaches_the_optimum():
    weight, d = random(OUT, IN), weights(OUT, seed=1)
    expanded = d[:, None].expand(OUT, IN)
    product = rows(weight, d, RANK)
    got = objective(weight, dense(product), expanded).item()
    best = min(descend(weight, expanded / d.max(), RANK, s) for s in (10, 20, 30)) * d.max().item()
    assert got <= best * (1 + 1e-6)
    assert best <= got * (1 + 1e-6)  # the independent optimiser did find it, so the line above can fail
    assert relative_slope(weight, product, expanded) < 1e-10


def test_plain_svd_is_not_the_weighted_optimum():
    weight, d = random(OUT, IN), weights(OUT)
    expanded = d[:, None].expand(OUT, IN)
    plain, weighted = rows(weight, torch.ones(OUT), RANK), rows(weight, d, RANK)
    assert objective(weight, dense(plain), expanded) > 1.5 * objective(weight, dense(weighted), expanded)
    assert relative_slope(weight, plain, expanded) > 1e-3


@settings(max_examples=25, deadline=None)
@given(
    d=st.lists(st.floats(1e-6, 1e6), min_size=6, max_size=6),
    rank=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_rows_explains_all_but_the_tail_of_the_weighted_spectrum(d, rank, seed):
    """Eckart and Young: what is left is the sum of the squared singular values beyond the rank."""
    weight, d = random(6, 5, seed=seed), torch.tensor(d, dtype=torch.float64)
    tail = torch.linalg.svdvals(d.sqrt()[:, None] * weight)[rank:].square().sum()
    total = (d[:, None] * weight**2).sum()
    left_over = objective(weight, dense(rows(weight, d, rank)), d[:, None])
    assert abs(left_over - tail) <= 1e-10 * total


def test_uniform_rows_give_pissa():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False))
    weight = model[0].weight.detach().clone()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK * 2, target_modules=["0"], init_lora_weights="pissa")
    layer = peft.get_peft_model(model, config).base_model.model[0]
    theirs = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(dense(rows(weight, torch.ones(OUT), RANK)).float(), theirs, atol=1e-5, rtol=1e-4)
    other = dense(rows(weight, weights(OUT), RANK)).float()
    assert (other - theirs).norm() > 0.1 * theirs.norm()


def test_unit_of_the_weights_and_zero_weights_do_not_matter():
    weight, d = random(OUT, IN), weights(OUT)
    for unit in (1e-30, 1e30):
        torch.testing.assert_close(dense(rows(weight, d * unit, RANK)), dense(rows(weight, d, RANK)))
    torch.testing.assert_close(
        dense(rows(weight, torch.zeros(OUT), RANK)), dense(rows(weight, torch.ones(OUT), RANK)), rtol=0, atol=0
    )
    some = d.clone()
    some[[2, 7]] = 0
    used = some > 0
    torch.testing.assert_close(dense(rows(weight, some, RANK))[used], dense(rows(weight[used], d[used], RANK)))


def solve(name, weight, u, v, rank):
    """Any solver, on the weights u_i v_j (`rows`: on u_i alone)."""
    given = {"rows": (u,), "rows-and-columns": (u, v), "elementwise": (u[:, None] * v,)}[name]
    return SOLVERS[name].function(weight, *given, rank)


@pytest.mark.fault(
    "importance from 1e-30 to 1e30, rows and columns of none, a weight of low rank, of zeros, the full rank",
    "P4",
    "finite factors that explain the weighted matrix",
    "low_rank.py: rows divides by the roots of the weights; _inverse without its bound",
)
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("split", SPLITS)
def test_hard_inputs_stay_finite_and_explained(name, split):
    """Weights over sixty orders of magnitude, zero rows and columns, a rank-deficient W, the full rank."""
    ones_u, ones_v = torch.ones(OUT, dtype=torch.float64), torch.ones(IN, dtype=torch.float64)
    wide = torch.logspace(-30, 30, OUT, dtype=torch.float64)
    holes_u, holes_v = ones_u.clone(), ones_v.clone()
    holes_u[[0, 4]], holes_v[3] = 0, 0
    deficient = random(OUT, 2) @ random(2, IN, seed=3)
    cases = [
        (random(OUT, IN), wide, ones_v, RANK, 1e-6),
        (random(OUT, IN), holes_u, holes_v if name != "rows" else ones_v, min(OUT, IN), 1e-12),
        (deficient, weights(OUT), ones_v, RANK, 1e-12),
        (random(OUT, IN), ones_u, ones_v, min(OUT, IN), 1e-12),
        (torch.zeros(OUT, IN), ones_u, ones_v, RANK, 0.0),
    ]
    for weight, u, v, rank, left_over in cases:
        factors = SPLITS[split](solve(name, weight, u, v, rank), SCALING)
        assert factors.B.shape == (OUT, rank) and factors.A.shape == (rank, IN)
        assert factors.B.isfinite().all() and factors.A.isfinite().all()
        element = u[:, None] * v
        total = (element * weight.double() ** 2).sum()
        assert objective(weight, SCALING * factors.B @ factors.A, element) <= left_over * total


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_are_deterministic_and_documented(name):
    weight, u, v = random(OUT, IN).float(), weights(OUT), weights(IN, seed=2)
    torch.manual_seed(0)
    first = solve(name, weight, u, v, RANK)
    torch.manual_seed(1)
    second = solve(name, weight, u, v, RANK)
    assert torch.equal(first.left, second.left) and torch.equal(first.right, second.right)
    row = SOLVERS[name]
    assert row.title and re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", row.paper) and row.function.__doc__


# --- rows and columns, elementwise ------------------------------------------------------------------------------------


def test_rows_and_columns_is_the_divided_form_and_a_minimum():
    weight, u, v = random(OUT, IN), weights(OUT, spread=1.0), weights(IN, seed=2, spread=1.0)
    element = u[:, None] * v
    product = rows_and_columns(weight, u, v, RANK)
    left, s, right = torch.linalg.svd(u.sqrt()[:, None] * weight * v.sqrt(), full_matrices=False)
    divided = (left[:, :RANK] * s[:RANK]) @ right[:RANK] / u.sqrt()[:, None] / v.sqrt()
    torch.testing.assert_close(dense(product), divided)
    best = objective(weight, dense(product), element)
    for seed in range(50):
        size = 10.0 ** -(seed % 5)
        moved_left = product.left + size * random(OUT, RANK, seed=seed)
        moved_right = product.right + size * random(RANK, IN, seed=seed + 1)
        assert objective(weight, moved_left @ moved_right, element) > best
    assert relative_slope(weight, product, element) < 1e-10
    assert relative_slope(weight, rows(weight, u, RANK), element) > 1e-3


def test_elementwise_reaches_the_closed_form_on_rank_one_weights():
    weight, u, v = random(OUT, IN), weights(OUT, spread=0.7), weights(IN, seed=2, spread=0.7)
    element = u[:, None] * v
    exact = objective(weight, dense(rows_and_columns(weight, u, v, RANK)), element)
    found = objective(weight, dense(elementwise(weight, element, RANK, sweeps=300)), element)
    assert exact <= found * (1 + 1e-12)
    assert found <= exact * (1 + 1e-6)


@pytest.mark.parametrize("spread", [0.5, 2.0, 8.0])
def test_elementwise_never_increases_its_objective(spread):
    weight, element = random(OUT, IN), weights(OUT, IN, spread=spread)
    start = objective(weight, dense(rows(weight, element.sum(1), RANK)), element).item()
    values = [objective(weight, dense(elementwise(weight, element, RANK, sweeps=n)), element).item() for n in range(8)]
    assert values[0] == pytest.approx(start, rel=1e-9)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(values))
    assert values[-1] < 0.95 * start  # so rows alone is not the answer here


def test_elementwise_finds_missing_entries_of_a_low_rank_matrix():
    weight = random(30, 2) @ random(2, 20, seed=3)
    seen = (random(30, 20, seed=4) > -0.5).double()
    product = elementwise(torch.where(seen > 0, weight, 99.0), seen, 2, sweeps=300)
    assert (dense(product) - weight).norm() < 1e-4 * weight.norm()


def test_elementwise_takes_row_blocks(monkeypatch):
    weight, element = random(OUT, IN), weights(OUT, IN)
    whole = elementwise(weight, element, RANK)
    monkeypatch.setattr("lorasure.init.low_rank.BLOCK_ENTRIES", 4 * IN * RANK)
    heights = []

    def block(start, stop):
        heights.append(stop - start)
        return element[start:stop]

    torch.testing.assert_close(dense(elementwise(weight, block, RANK)), dense(whole))
    assert max(heights) == 4


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_splits_keep_the_product(name):
    product = solve(name, random(OUT, IN), weights(OUT), weights(IN, seed=2), RANK)
    for split in SPLITS.values():
        factors = split(product, SCALING)
        torch.testing.assert_close(SCALING * factors.B @ factors.A, dense(product))


def test_balanced_factors_have_equal_gram_matrices():
    factors = balanced(rows(random(OUT, IN), weights(OUT), RANK), SCALING)
    torch.testing.assert_close(factors.B.T @ factors.B, factors.A @ factors.A.T)
    other = published(rows(random(OUT, IN), weights(OUT), RANK), SCALING)
    assert (other.B.T @ other.B - other.A @ other.A.T).norm() > 0.1


def test_published_split_is_the_published_formula():
    weight, d = random(OUT, IN), weights(OUT)
    u, s, v = torch.linalg.svd(d.sqrt()[:, None] * weight, full_matrices=False)
    root = (s[:RANK] / SCALING).sqrt()
    b, a = (u[:, :RANK] * root) / d.sqrt()[:, None], root[:, None] * v[:RANK]
    factors = published(rows(weight, d, RANK), SCALING)
    signs = (factors.A * a).sum(1).sign()
    torch.testing.assert_close(factors.A, signs[:, None] * a)
    torch.testing.assert_close(factors.B, signs * b)


def test_a_constant_factor_on_the_weights_moves_the_published_split_only():
    weight, d = random(OUT, IN), weights(OUT)
    for split, ratio in ((published, 100**0.25), (balanced, 1.0)):
        one, hundred = split(rows(weight, d, RANK), SCALING), split(rows(weight, 100 * d, RANK), SCALING)
        torch.testing.assert_close(hundred.A, ratio * one.A)
        torch.testing.assert_close(hundred.B, one.B / ratio)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_published_arithmetic_agrees_only_where_its_epsilon_is_small(where):
    weight = random(OUT, 2).float() @ random(2, IN, seed=3).float()  # low rank, so the coarse SVD is exact
    d = weights(OUT, spread=0.5) * (1e-12 if where == "outside" else 1.0)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    factors = published_rows(weight, d, 2, SCALING, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    again = published_rows(weight, d, 2, SCALING, seed=7)
    assert torch.equal(factors.B, again.B) and torch.equal(factors.A, again.A)
    error = (SCALING * factors.B @ factors.A - weight).norm() / weight.norm()
    assert error < 1e-4 if where == "inside" else error > 0.5


# --- ReGLU ------------------------------------------------------------------------------------------------------------


def moments(seed, size=OUT):
    x = random(200, size, seed=seed)
    return x.T @ x / len(x)


def test_contrast_directions_maximise_the_trace():
    forget, retain = moments(1), 3 * moments(2)
    q = contrast_directions(forget, retain, RANK, balance=0.6)
    matrix = 0.4 * forget - 0.6 * retain
    torch.testing.assert_close(q.T @ q, torch.eye(RANK, dtype=torch.float64))
    best = torch.trace(q.T @ matrix @ q)
    for seed in range(30):
        other = torch.linalg.qr(q + 0.1 * random(OUT, RANK, seed=seed)).Q
        assert torch.trace(other.T @ matrix @ other) < best
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()


def test_outputs_and_inputs_factors_are_projections_of_w():
    weight = random(OUT, IN)
    q = contrast_directions(moments(1), moments(2), RANK)
    p = contrast_directions(moments(1, IN), moments(2, IN), RANK)
    on_outputs, on_inputs = factors_on_outputs(weight, q, SCALING), factors_on_inputs(weight, p, SCALING)
    torch.testing.assert_close(SCALING * on_outputs.B @ on_outputs.A, q @ q.T @ weight)
    torch.testing.assert_close(SCALING * on_inputs.B @ on_inputs.A, weight @ p @ p.T)
    outside = torch.linalg.qr(torch.cat([p, random(IN, 1, seed=8)], dim=1)).Q[:, -1]
    torch.testing.assert_close(on_inputs.B @ on_inputs.A @ outside, torch.zeros(OUT, dtype=torch.float64))


def test_regulariser_basis_holds_most_of_the_retain_energy():
    retain = moments(2)
    basis = regulariser_basis(retain, 4)
    top = torch.linalg.eigvalsh(retain)[-4:].sum()
    torch.testing.assert_close(torch.trace(basis.T @ retain @ basis), top)
    assert regulariser_basis(retain).shape == (OUT, OUT)


# --- the SVD itself, and guards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "decaying"])
def test_large_svd_keeps_the_energy_and_its_own_generator(kind):
    matrix = random(700, 650)
    if kind == "decaying":
        matrix *= torch.linspace(0, -4, 700, dtype=torch.float64).exp()[:, None]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    u, s, v = top_singular(matrix, 8)
    assert torch.equal(torch.get_rng_state(), state)
    exact = torch.linalg.svdvals(matrix)[:8]
    assert not torch.equal(s, exact)  # the approximate branch did run
    assert (exact.square().sum() - s.square().sum()) / exact.square().sum() < 1e-3
    assert (exact.square().sum() - (matrix @ v).square().sum()) / exact.square().sum() < 1e-3
    torch.testing.assert_close(u.T @ u, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(v.T @ v, torch.eye(8, dtype=torch.float64))
    assert all(torch.equal(x, y) for x, y in zip((u, s, v), top_singular(matrix, 8), strict=True))
    coarse = torch.svd_lowrank(matrix, q=8, niter=2)[1]
    assert (exact.square().sum() - coarse.square().sum()) / exact.square().sum() > (
        1e-2 if kind == "decaying" else 5e-2
    )


def test_large_zero_matrix_is_no_special_case():
    assert all(x.isfinite().all() for x in top_singular(torch.zeros(530, 520), 2))


def test_wrong_inputs_are_named():
    weight, d = random(OUT, IN), weights(OUT)
    for rank in (0, IN + 1):
        with pytest.raises(UsageError, match=re.escape(f"rank must be in [1, {IN}], got {rank}")):
            rows(weight, d, rank)
    for bad in (float("nan"), -1.0, float("inf")):
        broken = d.clone()
        broken[3] = bad
        with pytest.raises(ValueError, match="finite and at least 0"):
            rows(weight, broken, RANK)
        with pytest.raises(ValueError, match="finite and at least 0"):
            elementwise(weight, broken[:, None].expand(OUT, IN), RANK)
    with pytest.raises(ValueError, match="expected 14 weights"):
        rows(weight, d[1:], RANK)
    with pytest.raises(ValueError, match=r"expected weights \(14, 11\)"):
        elementwise(weight, torch.ones(IN, OUT), RANK)
    with pytest.raises(ValueError, match=r"expected a weight \(out, in\)"):
        rows(weight[0], d, RANK)
    with pytest.raises(NumericError, match="the weight has a non-finite value"):
        rows(weight / 0, d, RANK)
    with pytest.raises(UsageError, match="scaling must be above 0, got 0"):
        balanced(rows(weight, d, RANK), 0)
    with pytest.raises(UsageError, match=r"balance must be in \[0, 1\], got 2"):
        contrast_directions(moments(1), moments(2), RANK, balance=2)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
@pytest.mark.parametrize("decades", [3, 14])
def test_singular_triplets_are_exact_over_many_orders_of_magnitude(decades, shape):
    """Ten values spread over so many decades: squaring the matrix would lose those below 1e-8 of the largest."""
    u, v = (torch.linalg.qr(random(n, 10, seed=n)).Q for n in shape)
    strengths = torch.logspace(0, -decades, 10, dtype=torch.float64)
    found_u, s, found_v = top_singular(u * strengths @ v.T, 8)
    torch.testing.assert_close(s, strengths[:8], rtol=1e-3 if decades == 14 else 1e-10, atol=0)
    for true, found in ((u, found_u), (v, found_v)):
        assert float((true[:, :8] * found).sum(0).abs().min()) > 0.99
    torch.testing.assert_close(found_u.T @ found_u, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-10)
