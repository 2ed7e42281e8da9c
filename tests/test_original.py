"""What is taken from the original model: the same as each part alone would give, with no row computed twice."""

from __future__ import annotations

import pytest
import torch

from architectures import tiny_model
from conftest import random_examples, tiny_llama
from lorasure.data.examples import collate
from lorasure.forward import answer_hidden, answer_records
from lorasure.layers import decoder_layers
from lorasure.original import DEPTHS, FINAL, PREFIX, RECORD, observe
from lorasure.prefix import Prefix

ROWS = random_examples(8, 4)
ASKED = {RECORD: ROWS[:4], FINAL: ROWS[2:6], PREFIX: ROWS[1:]}  # every combination that there is


def prefix_of(model, rows=ASKED[PREFIX]):
    return Prefix(decoder_layers(model), 2, dict.fromkeys(rows))


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # gemma2 caps its logits after the projection
@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_each_part_is_what_it_is_alone(name, budget):
    model = tiny_model(name, num_hidden_layers=4)
    prefix, told = prefix_of(model), []
    found = observe(model, ASKED, budget, prefix, told.append)
    assert list(found.records) and set(found.records) == set(ASKED[RECORD])
    for example, record in zip(ROWS, answer_records(model, ROWS, 1), strict=True):
        if example in found.records:
            assert found.records[example].log_probs == pytest.approx(record.log_probs, abs=1e-5)
    assert set(found.final) == set(ASKED[FINAL]) and set(prefix.states) == set(ASKED[PREFIX])
    layer = {}
    model.model.layers[2].register_forward_pre_hook(lambda module, args: layer.update(entering=args[0][0]))
    for example in ROWS:
        final = answer_hidden(model, collate([example]))
        if example in found.final:
            torch.testing.assert_close(found.final[example], final, atol=1e-5, rtol=1e-5)
        if example in prefix.states:
            torch.testing.assert_close(prefix.states[example], layer["entering"], atol=1e-5, rtol=1e-5)
    assert sum(told) == len(ROWS)


def test_each_row_goes_once_and_no_further_than_it_is_asked_for():
    model = tiny_llama(layers=4)
    rows = [0] * 4
    for number, layer in enumerate(model.model.layers):

        def count(module, args, output, number=number):
            rows[number] += len(output)

        layer.mlp.register_forward_hook(count)
    observe(model, ASKED, 1000, prefix_of(model))
    assert rows == [8, 8, 6, 6]  # the last two are asked for what enters layer 2 only
    rows[:] = [0] * 4
    observe(model, {depth: [ROWS[0], ROWS[0]] for depth in DEPTHS}, 1000, prefix_of(model, ROWS[:1]))
    assert rows == [1] * 4


def test_again_to_the_same_bits():
    model = tiny_llama(layers=4)
    kept = []
    for _ in range(2):
        prefix = prefix_of(model)
        kept.append((observe(model, ASKED, 64, prefix), prefix.states))
    (one, states), (other, again) = kept
    assert one.records == other.records
    assert all(torch.equal(one.final[e], other.final[e]) for e in one.final)
    assert all(torch.equal(states[e], again[e]) for e in states)


def test_nothing_asked_is_nothing_computed(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("a pass"))
    found = observe(model, dict.fromkeys(DEPTHS, ()), 64)
    assert not found.records and not found.final


def test_what_is_kept_holds_on_to_no_whole_batch():
    """A view would keep its batch alive: the cache would be as large as all batches, padding included."""
    model = tiny_llama(layers=4)
    prefix = prefix_of(model)
    found = observe(model, ASKED, 1000, prefix)
    for kept in (*found.final.values(), *prefix.states.values()):
        assert kept.untyped_storage().nbytes() == kept.nbytes
