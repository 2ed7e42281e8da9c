"""Streaming moments against the formulas over the whole sample in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasure.importance.moments import Moments, wide

SHAPE = (3, 2)
splits = st.lists(st.integers(1, 7), min_size=1, max_size=8)


def sample(count: int, seed: int, mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + deviation * torch.randn(count, *SHAPE, generator=generator)


def streamed(values: torch.Tensor, sizes: list[int]) -> Moments:
    moments = Moments.empty(SHAPE)
    for part in values.split(sizes):
        moments.update(part)
    return moments


def assert_batch_formulas(moments: Moments, values: torch.Tensor) -> None:
    """The definitions, over everything at once, in float64."""
    exact = values.double()
    variance = (exact - exact.mean(0)).square().mean(0)
    assert moments.count == len(values)
    close = {"rtol": 2e-5, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(moments.mean, exact.mean(0), **close)
    torch.testing.assert_close(moments.variance, variance, **close)
    torch.testing.assert_close(moments.second, exact.square().mean(0), **close)
    torch.testing.assert_close(moments.absolute, exact.abs().mean(0), **close)


@settings(max_examples=60, deadline=None)
@given(sizes=splits, seed=st.integers(0, 1000), mean=st.floats(-3, 3))
def test_any_split_into_batches_gives_the_batch_formulas(sizes: list[int], seed: int, mean: float) -> None:
    values = sample(sum(sizes), seed, mean)
    assert_batch_formulas(streamed(values, sizes), values)


@settings(max_examples=40, deadline=None)
@given(sizes=st.tuples(*[st.lists(st.integers(1, 5), max_size=3)] * 3), seed=st.integers(0, 1000))
def test_merge_is_associative_and_takes_empty_parts(sizes: tuple[list[int], ...], seed: int) -> None:
    totals = [sum(s) for s in sizes]
    values = sample(sum(totals), seed, 2.0)

    def part(i: int) -> Moments:
        return streamed(values.split(totals)[i], sizes[i]) if totals[i] else Moments.empty(SHAPE)

    left, right = part(0), part(1)
    left.merge(part(1))
    left.merge(part(2))
    right.merge(part(2))
    whole = part(0)
    whole.merge(right)
    for moments in (left, whole):
        if len(values):
            assert_batch_formulas(moments, values)
        else:
            assert moments.count == 0


@pytest.mark.parametrize("size", [1, 5, 200])
def test_the_variance_keeps_its_digits_where_the_naive_difference_loses_them(size: int) -> None:
    """Values 1e4 +- 1e-2 in float32, whose squares are 8 apart: E[g^2] - E[g]^2 has no correct digit."""
    values = sample(1000, 3, mean=1e4, deviation=1e-2)
    exact = values.double().var(0, correction=0)
    naive = values.square().mean(0) - values.mean(0).square()
    assert ((naive - exact).abs() > 100 * exact).any() or (naive < 0).any()
    variance = streamed(values, [size] * (1000 // size)).variance
    assert ((variance - exact).abs() < 0.05 * exact).all()


@settings(max_examples=60, deadline=None)
@given(sizes=splits, seed=st.integers(0, 1000), mean=st.floats(-1e6, 1e6), exponent=st.integers(-9, 3))
def test_a_variance_is_never_negative(sizes: list[int], seed: int, mean: float, exponent: int) -> None:
    values = sample(sum(sizes), seed, mean, 10.0**exponent)
    assert (streamed(values, sizes).variance >= 0).all()


def test_one_value_repeated_has_variance_zero_exactly() -> None:
    values = torch.full((9, *SHAPE), 0.1)
    assert not streamed(values, [4, 3, 2]).variance.any()


def test_half_precision_values_are_summed_in_float32() -> None:
    values = sample(600, 5, mean=1.0).bfloat16()
    assert_batch_formulas(streamed(values, [60] * 10), values)
    assert streamed(values, [600]).mean.dtype == torch.float32


def test_float64_is_made_on_the_cpu_where_the_device_has_none() -> None:
    there, here = torch.ones(2), torch.zeros(2)
    assert wide(there).dtype == torch.float64 and torch.equal(wide(there), there.double())
    stand_in = SimpleNamespace(device=torch.device("mps"), cpu=lambda: here)
    assert torch.equal(wide(stand_in), here.double())
