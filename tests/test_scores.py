"""Weights of rows, columns and entries against explicit maps; the theorems of LoRA and sketches by Monte Carlo."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorasure.errors import UsageError
from lorasure.importance import scores
from lorasure.importance.collect import Probe, per_example
from lorasure.importance.moments import Moments
from lorasure.importance.scores import SCORES, choose_sites, ratio, site_weights
from lorasure.sites import Site

OUT, IN, RANK = 6, 9, 2
SHAPES = {
    "full": {"W": (OUT, IN)},
    "lora": {"B": (OUT, RANK), "A": (RANK, IN)},
    "sketch": {"rows": (OUT, RANK), "columns": (RANK, IN)},
}


def random_moments(space: str, seed: int, scale: float = 1.0) -> dict[str, Moments]:
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in SHAPES[space].items():
        result[name] = Moments.empty(shape)
        result[name].update(scale * torch.randn(12, *shape, generator=generator))
    return result


def with_second(**values: Tensor) -> dict[str, Moments]:
    """Moments of mean zero with these second moments."""
    return {n: Moments(1, torch.zeros_like(v), v, torch.zeros_like(v)) for n, v in values.items()}


def explicit_map(score: str, space: str, forget: dict[str, Moments], retain: dict[str, Moments]) -> Tensor:
    """M = F / R as one (out, in) tensor."""
    rule = SCORES[score].function
    top, bottom = ({n: rule(m).double() for n, m in part.items()} for part in (forget, retain))
    if space == "full":
        return top["W"] / bottom["W"]
    return (top["B"] @ top["A"]) / (bottom["B"] @ bottom["A"])


@pytest.mark.parametrize("rows_per_block", [1, 4, 1024])
@pytest.mark.parametrize("space", ["full", "lora"])
@pytest.mark.parametrize("score", SCORES)
def test_rows_columns_mean_and_blocks_are_those_of_the_explicit_map(
    score: str, space: str, rows_per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "ROWS_PER_BLOCK", rows_per_block)
    forget, retain = random_moments(space, 1), random_moments(space, 2)
    expected = explicit_map(score, space, forget, retain)
    found = site_weights(score, space, forget, retain)
    assert found.rows.dtype == torch.float64
    torch.testing.assert_close(found.rows, expected.sum(1))
    torch.testing.assert_close(found.columns, expected.sum(0) / expected.sum())
    torch.testing.assert_close(found.block(2, 5), expected[2:5])
    assert found.mean == pytest.approx(float(expected.mean()))
    outer = torch.outer(found.rows, found.columns)
    torch.testing.assert_close(outer.sum(1), expected.sum(1))  # margins equal: the Kullback-Leibler projection
    torch.testing.assert_close(outer.sum(0), expected.sum(0))


def test_sketch_weights_are_ratios_of_energies_in_the_unit_of_the_map() -> None:
    """Where retain is the same everywhere and forget is of rank one, ratios of sums are the sums of ratios."""
    rows, columns = torch.rand(OUT), torch.rand(IN)
    forget = with_second(rows=(rows * columns.sum())[:, None], columns=(rows.sum() * columns)[None])
    retain = with_second(rows=torch.full((OUT, 1), 2.0 * IN), columns=torch.full((1, IN), 2.0 * OUT))
    expected = torch.outer(rows, columns).double() / 2
    found = site_weights("fisher", "sketch", forget, retain)
    torch.testing.assert_close(found.rows, expected.sum(1))
    torch.testing.assert_close(found.columns, expected.sum(0) / expected.sum())
    torch.testing.assert_close(found.block(0, OUT), expected)
    assert found.mean == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize("space", SHAPES)
def test_a_constant_on_one_set_only_scales_the_weights(space: str) -> None:
    forget, retain = random_moments(space, 1), random_moments(space, 2)
    base = site_weights("variance", space, forget, retain)
    power = 2 if space == "lora" else 1
    for constant in (1e-14, 1e-3, 1e12):  # of gradients; scores scale with the square, LoRA products with the fourth
        for weights, factor in (
            (site_weights("variance", space, random_moments(space, 1, constant), retain), constant ** (2 * power)),
            (site_weights("variance", space, forget, random_moments(space, 2, constant)), constant ** (-2 * power)),
        ):
            torch.testing.assert_close(weights.rows / factor, base.rows, rtol=1e-4, atol=0)
            torch.testing.assert_close(weights.columns, base.columns, rtol=1e-4, atol=0)
            torch.testing.assert_close(weights.block(1, 4) / factor, base.block(1, 4), rtol=1e-4, atol=0)
    published = site_weights("variance", space, forget, random_moments(space, 2, 1e-4), floor=1e-5)
    if space != "sketch":  # the published epsilon is not so: this test can fail
        assert not torch.allclose(published.columns, base.columns, rtol=1e-3)


@settings(max_examples=100, deadline=None)
@given(exponents=st.lists(st.integers(-30, 30), min_size=2 * OUT * IN, max_size=2 * OUT * IN))
def test_ratios_are_finite_over_sixty_orders_of_magnitude(exponents: list[int]) -> None:
    values = torch.pow(10.0, torch.tensor(exponents, dtype=torch.float64)).reshape(2, OUT, IN)
    found = ratio(values[0], values[1], float(values[1].mean()), None)
    assert torch.isfinite(found).all() and (found > 0).all()
    # the bound touches only what lies below the rounding error of the largest retain scores
    exact = values[1] > 2e-7 * values[1].max()
    torch.testing.assert_close(found[exact], (values[0] / values[1])[exact])


def test_rows_and_sites_that_a_set_never_reaches() -> None:
    forget, retain = torch.rand(OUT, IN) + 0.5, torch.rand(OUT, IN) + 0.5
    ordinary = site_weights("fisher", "full", with_second(W=forget), with_second(W=retain))
    holed = retain.clone()
    holed[3] = 0
    row = site_weights("fisher", "full", with_second(W=forget), with_second(W=holed))
    assert torch.isfinite(row.rows).all() and row.rows.argmax() == 3
    torch.testing.assert_close(row.rows[:3], ordinary.rows[:3])
    unseen = site_weights("fisher", "full", with_second(W=forget * 1e-30), with_second(W=torch.zeros(OUT, IN)))
    assert torch.isfinite(unseen.rows).all()
    torch.testing.assert_close(unseen.columns, forget.double().sum(0) / forget.double().sum())
    means = {"a": ordinary.mean, "holed": row.mean, "unseen": unseen.mean, "b": ordinary.mean}
    assert choose_sites(means, 0.25) == ["unseen"]
    nothing = site_weights("fisher", "full", with_second(W=torch.zeros(OUT, IN)), with_second(W=torch.zeros(OUT, IN)))
    assert not nothing.rows.any() and not nothing.columns.any() and nothing.mean == 0


def test_choose_sites_keeps_the_top_share_in_order_and_at_least_one() -> None:
    means = {"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0}
    assert choose_sites(means, 0.5) == ["b", "d"]
    assert choose_sites(means, 0.75) == ["b", "c", "d"]
    assert choose_sites(means, 0.01) == ["b"]
    assert choose_sites(means, 1.0) == list(means)


@pytest.mark.parametrize("score", SCORES)
def test_only_sums_of_squares_can_be_sketched(score: str) -> None:
    forget, retain = random_moments("sketch", 1), random_moments("sketch", 2)
    if score != "absolute":
        assert torch.isfinite(site_weights(score, "sketch", forget, retain).rows).all()
        return
    with pytest.raises(UsageError, match=r"--score absolute cannot be estimated.*fisher, variance, expectation"):
        site_weights(score, "sketch", forget, retain)


def sketched(x: Tensor, d: Tensor, seed: int, space: str = "sketch") -> dict[str, Moments]:
    probe = Probe(space, rank=4, sigma=0.3, scaling=1.0, seed=seed)
    factors = probe.factors(Site("layer", (d.shape[-1], x.shape[-1])), x.device)
    (values,) = per_example(probe, factors, x, d)
    result = {name: Moments.empty(tuple(value.shape[1:])) for name, value in values.items()}
    for name, value in values.items():
        result[name].update(value)
    return result


@pytest.mark.parametrize("score", ["fisher", "variance", "expectation"])
def test_a_sketch_estimates_row_and_column_sums_without_bias(score: str) -> None:
    """The mean over many probes lies within four standard errors of the sums of the full map, which are tight."""
    torch.manual_seed(0)
    examples, tokens, seeds = 8, 3, 600
    x, d = torch.randn(examples, tokens, IN) + 0.5, torch.randn(examples, tokens, OUT)
    full = Moments.empty((OUT, IN))
    full.update(d.mT @ x)
    exact = SCORES[score].function(full)

    def estimates(space: str, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
        drawn = [sketched(x, d, seed, space) for seed in range(seeds)]
        rows = torch.stack([SCORES[score].function(m[names[0]]).sum(1) for m in drawn])
        return rows, torch.stack([SCORES[score].function(m[names[1]]).sum(0) for m in drawn])

    for found, expected in zip(estimates("sketch", ("rows", "columns")), (exact.sum(1), exact.sum(0)), strict=True):
        error = found.std(0) / seeds**0.5
        assert (error < 0.1 * expected).all()
        assert ((found.mean(0) - expected).abs() < 4 * error).all()
    found, _ = estimates("lora", ("B", "A"))  # probes of another scale miss: the test can fail
    assert ((found.mean(0) - exact.sum(1)).abs() > 10 * found.std(0) / seeds**0.5).all()


def factor_variance(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(variance of B A over the samples, the map that LoRA space makes of the factors' moments)."""
    product, factors = Moments.empty((OUT, IN)), {"B": Moments.empty((OUT, RANK)), "A": Moments.empty((RANK, IN))}
    product.update(b @ a)
    factors["B"].update(b)
    factors["A"].update(a)
    # a retain score of one everywhere, so that M is the forget score itself
    ones = with_second(B=torch.full((OUT, RANK), 1 / RANK), A=torch.ones(RANK, IN))
    return product.variance.double(), site_weights("variance", "lora", factors, ones).block(0, OUT)


def test_the_variance_of_a_product_of_independent_zero_mean_factors() -> None:
    """VILA's Theorem 1, Var(B A) = Var B @ Var A, by Monte Carlo, and that each of its conditions is needed."""
    torch.manual_seed(1)
    samples = 40_000
    b = torch.randn(samples, OUT, RANK) * (0.5 + torch.rand(OUT, RANK))
    a = torch.randn(samples, RANK, IN) * (0.5 + torch.rand(RANK, IN))
    true, claimed = factor_variance(b, a)
    torch.testing.assert_close(claimed, true, rtol=0.08, atol=0)
    common = torch.randn(samples, 1, 1)
    for broken in ((b * common, a * common), (b + 1.5, a), (b, a + 1.5)):
        true, claimed = factor_variance(*broken)
        assert ((claimed / true - 1).abs() > 0.3).float().mean() > 0.9
