"""Per-token statistics of answers: transformers' logits in float64 give the same, in whatever batch, order or side."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from architectures import ARCHITECTURES
from conftest import random_examples, tiny_llama
from lorasure import forward
from lorasure.data.examples import collate
from lorasure.forward import Record, answer_records, vocabulary_moments
from lorasure.losses import tokens

EXAMPLES = random_examples(9, seed=3)
COLUMNS = ("log_probs", "expected", "variance")


def same(one: Record, other: Record, tolerance: float = 1e-5) -> bool:
    columns = all(getattr(one, c) == pytest.approx(getattr(other, c), abs=tolerance) for c in COLUMNS)
    return columns and one.correct == other.correct


def test_every_column_against_the_definition() -> None:
    """Reference: one plain forward pass per example, then sums over the vocabulary in float64."""
    model = tiny_llama()
    for example, record in zip(EXAMPLES, answer_records(model, EXAMPLES, 64, moments=True), strict=True):
        ids = torch.tensor(example.input_ids)
        log_p = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)[example.answer_start - 1 :]
        p, targets = log_p.exp(), ids[example.answer_start :]
        mean = (p * log_p).sum(-1)
        assert record.log_probs == pytest.approx(log_p.gather(1, targets[:, None])[:, 0].tolist(), abs=1e-5)
        assert record.expected == pytest.approx(mean.tolist(), abs=1e-5)
        assert record.variance == pytest.approx(((p * log_p**2).sum(-1) - mean**2).tolist(), abs=1e-5)
        assert record.nll == pytest.approx(-sum(record.log_probs)) and record.tokens == example.answer_length
    assert max(record.variance) > 0.1  # else the comparison would show little


@pytest.mark.fault(
    "padding on the left or the right, other rows and orders in a batch",
    "P10",
    "the same scores up to rounding",
    "examples.py: positions count padding",
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # gpt2 has absolute positions, so a shifted row would show
@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_records_do_not_depend_on_batch_order_or_padding_side(
    budget: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    records = partial(answer_records, model, moments=True)
    alone = records(EXAMPLES, 1)
    assert all(map(same, alone, records(EXAMPLES, budget)))
    backwards = records(EXAMPLES[::-1], budget)
    assert all(map(same, alone, backwards[::-1])) and not all(map(same, alone, backwards))
    monkeypatch.setattr(forward, "collate", partial(collate, side="left"))
    assert all(map(same, alone, records(EXAMPLES, budget)))


def test_moments_in_closed_form_and_at_the_edges() -> None:
    """A uniform distribution has no variance; one that is certain, and one that rules tokens out, stay finite."""
    logits = torch.zeros(4, 8)
    logits[1, 2] = 1e4
    logits[2, 4:] = -torch.inf
    logits[3, 0] = torch.tensor(3.0).log()  # p = 3/10 and seven times 1/10
    mean, variance = vocabulary_moments(logits)
    log = torch.tensor([0.3, 0.1]).log()
    expected = 0.3 * log[0] + 0.7 * log[1]
    torch.testing.assert_close(
        mean, torch.stack([-torch.tensor(8.0).log(), *torch.tensor([0, 0.25]).log(), expected]).nan_to_num(neginf=0.0)
    )
    torch.testing.assert_close(variance, torch.tensor([0, 0, 0, 0.21 * float(log[0] - log[1]) ** 2]))


def test_the_block_of_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    whole = answer_records(model, EXAMPLES, 1000, moments=True)
    monkeypatch.setattr(tokens, "ROWS", 3)
    assert all(map(partial(same, tolerance=2e-6), whole, answer_records(model, EXAMPLES, 1000, moments=True)))
