"""Pairing: who meets whom, for every mode, size and epoch."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasure.data.pairing import PAIRINGS, pairs, sample
from lorasure.errors import DataError, UsageError

SIZES = st.integers(1, 12)


def blank(n):
    return [None] * n


def run(n_forget, n_retain, epochs, mode="random", seed=0):
    return [pairs(blank(n_forget), blank(n_retain), epoch=e, seed=seed, mode=mode) for e in range(epochs)]


@pytest.mark.parametrize("mode", PAIRINGS)
@given(n_forget=SIZES, n_retain=SIZES, seed=st.integers(0, 5))
def test_every_forget_row_once_and_retain_rows_evenly(mode, n_forget, n_retain, seed):
    groups = (["g"] * n_forget, ["g"] * n_retain)
    epochs = [pairs(*groups, epoch=e, seed=seed, mode=mode) for e in range(4)]
    for epoch in epochs:
        assert sorted(f for f, _ in epoch) == list(range(n_forget))
        assert all(0 <= r < n_retain for _, r in epoch)
    stream = [r for epoch in epochs for _, r in epoch]
    for end in range(1, len(stream) + 1):  # no retain row comes twice more than another, at any moment
        uses = Counter(dict.fromkeys(range(n_retain), 0)) + Counter(stream[:end])
        least = min(uses[r] for r in range(n_retain))
        assert max(uses.values()) - least <= 1


@pytest.mark.parametrize("mode", PAIRINGS)
def test_an_epoch_needs_neither_those_before_it_nor_the_global_generator(mode):
    groups = (["a", "b"] * 4, ["b", "a", "a"])
    random.seed(1)
    state = random.getstate()
    first = [pairs(*groups, epoch=e, seed=3, mode=mode) for e in range(3)]
    assert random.getstate() == state
    assert pairs(*groups, epoch=2, seed=3, mode=mode) == first[2]


def test_random_changes_with_epoch_and_seed():
    a, b = run(20, 50, 2)
    assert a != b and [f for f, _ in a] != [f for f, _ in b]
    assert a != run(20, 50, 1, seed=1)[0]
    assert [f for f, _ in a] != list(range(20))


def test_random_order_is_fixed_for_good():
    """The order of a published run must not change with a later version."""
    assert run(4, 6, 2, seed=7) == [[(2, 1), (3, 0), (0, 3), (1, 4)], [(2, 2), (3, 5), (0, 0), (1, 1)]]


def test_cyclic_goes_on_where_the_last_epoch_ended():
    assert run(3, 5, 2, "cyclic") == [[(0, 0), (1, 1), (2, 2)], [(0, 3), (1, 4), (2, 0)]]


def test_modular_stays_inside_the_group():
    forget, retain = ["a", "b", "a"], ["b", "a", "c", "a", "a"]
    epochs = [pairs(forget, retain, epoch=e, seed=0, mode="modular") for e in range(2)]
    assert epochs == [[(0, 1), (1, 0), (2, 3)], [(0, 4), (1, 0), (2, 1)]]


def test_modular_errors():
    with pytest.raises(DataError, match=r"no retain row has the group of forget row 2.$"):
        pairs(["a", "b"], ["a"], epoch=0, seed=0, mode="modular")
    with pytest.raises(UsageError, match=r"--pairing modular needs a group.*retain row 2 has none"):
        pairs(["a"], ["a", None], epoch=0, seed=0, mode="modular")


def test_wrong_arguments():
    with pytest.raises(UsageError, match=re.escape("Unknown pairing 'randon'. Did you mean 'random'?")):
        pairs(["a"], ["a"], epoch=0, seed=0, mode="randon")
    with pytest.raises(DataError, match="The retain set is empty"):
        pairs(["a"], [], epoch=0, seed=0, mode="cyclic")
    with pytest.raises(DataError, match="The forget set is empty"):
        pairs([], ["a"], epoch=0, seed=0, mode="cyclic")
    with pytest.raises(DataError, match="empty set"):
        sample(0, 1, 0)
    with pytest.raises(UsageError, match="at least 0, got -1"):
        sample(3, -1, 0)


@given(n=SIZES, k=st.integers(0, 40), seed=st.integers(0, 5))
def test_sample_is_even_and_repeatable(n, k, seed):
    drawn = sample(n, k, seed)
    assert len(drawn) == k and drawn == sample(n, k, seed)
    assert len(set(drawn)) == min(n, k)
    uses = Counter(drawn)
    assert max((uses[i] for i in range(n)), default=0) - min(uses[i] for i in range(n)) <= 1


def test_sample_depends_on_the_seed_and_is_no_prefix():
    assert sample(1000, 5, 0) != sample(1000, 5, 1)
    assert sample(1000, 5, 0) != list(range(5))
