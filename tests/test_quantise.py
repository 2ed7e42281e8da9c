"""Rounding weights: against every level tried one by one, its bound, and that a second time changes nothing."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from architectures import ARCHITECTURES, tiny_model
from lorasure.errors import UsageError
from lorasure.evaluate.attacks import quantised
from lorasure.evaluate.quantise import GROUPS, nf4, round_to_nearest
from lorasure.sites import all_sites, weight

BITS = sorted(GROUPS)
HIGHEST = {8: 127, 4: 7}


def matrix(outputs=5, inputs=300, seed=0):
    """Rows of very different size, so that a scale shared by rows would show."""
    values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return values * torch.logspace(-3, 2, outputs)[:, None]


def groups(row, bits):
    size = GROUPS[bits] or len(row)
    return [row[start : start + size] for start in range(0, len(row), size)]


@pytest.mark.parametrize("bits", BITS)
def test_every_weight_becomes_its_nearest_level(bits):
    given = matrix()
    found = round_to_nearest(given, bits)
    for row, rounded in zip(given.double().numpy(), found.double().numpy(), strict=True):
        for part, after in zip(groups(row, bits), groups(rounded, bits), strict=True):
            levels = np.arange(-HIGHEST[bits], HIGHEST[bits] + 1) * np.abs(part).max() / HIGHEST[bits]
            nearest = levels[np.abs(part[:, None] - levels).argmin(1)]
            np.testing.assert_allclose(after, nearest, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_error_bound_and_that_it_is_nearly_reached(bits):
    given = matrix(seed=1)
    error = (round_to_nearest(given, bits) - given).abs()
    for row, moved in zip(given, error, strict=True):
        for part, by in zip(groups(row, bits), groups(moved, bits), strict=True):
            bound = part.abs().max() / HIGHEST[bits] / 2
            assert 0.5 * bound < by.max() <= bound * (1 + 1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_a_second_time_changes_nothing(bits):
    once = round_to_nearest(matrix(seed=2), bits)
    torch.testing.assert_close(round_to_nearest(once, bits), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zero_and_the_largest_stays(bits):
    given = matrix(outputs=3)
    given[1] = 0
    found = round_to_nearest(given, bits)
    assert not found[1].any() and found.isfinite().all()
    at = given[0].abs().argmax()
    torch.testing.assert_close(found[0, at], given[0, at])


def test_groups_of_four_bits_do_not_see_each_other():
    given = matrix(outputs=1)
    larger = given.clone()
    larger[0, 299] = 1e4
    one, other = round_to_nearest(given, 4), round_to_nearest(larger, 4)
    assert torch.equal(one[0, :256], other[0, :256]) and not torch.equal(one[0, 256:299], other[0, 256:299])


def test_other_bits_are_refused():
    with pytest.raises(UsageError, match="bits must be one of 8, 4, got 3"):
        round_to_nearest(matrix(), 3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_of_a_model_is_rounded_and_nothing_else(name):
    before, model = tiny_model(name), tiny_model(name)
    quantised(model, lambda w: round_to_nearest(w, 4))
    sites = all_sites(before)
    for site in sites:
        assert torch.equal(weight(model, site), round_to_nearest(weight(before, site), 4)), site.name
    of_sites = {f"{s.module}.{s.parameter or 'weight'}" for s in sites}
    rest = {key: value for key, value in before.state_dict().items() if key not in of_sites}
    assert rest and all(torch.equal(value, model.state_dict()[key]) for key, value in rest.items())


def test_nf4_asks_bitsandbytes_for_nf4_and_gives_back_its_weights(monkeypatch):
    functions = types.ModuleType("bitsandbytes.functional")
    functions.quantize_4bit = lambda w, *, blocksize, quant_type: ((w, blocksize, quant_type), "state")
    functions.dequantize_4bit = lambda codes, state: (*codes, state)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functions)
    given = matrix()
    found = nf4(given)
    assert found[0] is given and found[1:] == (64, "nf4", "state")
