"""Losses through a projection, a few tokens at a time: the values and gradients of whole logits, at a bounded size."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from architectures import tiny_model
from conftest import VOCAB, random_examples, tiny_llama
from lorasure import forward
from lorasure.data.examples import collate
from lorasure.forward import answer_hidden, answer_logits, answer_records
from lorasure.losses import tokens
from lorasure.losses.bigrams import Bigrams
from lorasure.losses.forget import FORGET_LOSSES, needs
from lorasure.losses.retain import RETAIN_LOSSES
from lorasure.losses.tokens import Answers

WORDS, WIDTH = 31, 5
ROWS = {f"forget-{name}": row.function for name, row in FORGET_LOSSES.items()}
ROWS |= {f"retain-{name}": row.function for name, row in RETAIN_LOSSES.items() if row.function}
EXAMPLE = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
TARGETS = torch.arange(10) * 3
PREVIOUS = torch.arange(10) % 4


def inputs(project: Callable, states: list[torch.Tensor]) -> dict[str, object]:
    """Everything that a loss may ask for."""
    constants = torch.tensor([4.0, 9.0, 5.0], dtype=torch.float64)
    answers, refusals = (Answers(s, TARGETS, EXAMPLE, 3, project, PREVIOUS) for s in states[:2])
    found = {"answers": answers, "refusals": refusals, "original_states": states[2]}
    found |= {"reference": constants, "refusal_reference": constants - 1}
    return found | {"bigrams": Bigrams.of(random_examples(9, vocab=WORDS), WORDS)}


def drawn(seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return normal(WIDTH, WORDS), [normal(10, WIDTH) for _ in range(3)]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("rows", [1, 3, 10])
def test_values_and_gradients_are_those_of_whole_logits(rows: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the same function of logits that autograd has made of the states, in one chunk."""
    head, states = drawn()
    found = []
    for chunk, project in ((rows, lambda s: s @ head), (1000, None)):
        monkeypatch.setattr(tokens, "ROWS", chunk)
        leaves = [s.clone().requires_grad_() for s in states]
        given = inputs(project, leaves) if project else inputs(tokens._as_they_are, [s @ head for s in leaves])
        values = ROWS[name](**{need: given[need] for need in needs(ROWS[name])})
        values.square().sum().backward()  # slopes of examples that differ
        found.append((values.detach(), [s.grad for s in leaves[:2] if s.grad is not None]))
    (values, gradients), (expected, references) = found
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    assert len(gradients) == len(references) > 0
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """Most rows of any tensor with an axis as long as the vocabulary."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.rows = words, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and self.words in tensor.shape:
                rows = tensor.numel() // self.words
                is_weight = 16 in tensor.shape  # the model's width
                self.rows = max(self.rows, 0 if is_weight else rows)
        return found


def most_rows(work: Callable[[], object]) -> int:
    with Largest(VOCAB) as largest:
        work()
    return largest.rows


@pytest.mark.parametrize("name", ROWS)
def test_no_more_than_a_chunk_of_logits_is_ever_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ROWS", 7)
    model, batch = tiny_llama(), collate(random_examples(12))
    original, bigrams = answer_hidden(model, batch), Bigrams.of(random_examples(12), VOCAB)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)

    def step() -> None:
        answers, states = answer_logits(model, batch, original)
        assert len(answers.targets) > 40
        constant = torch.ones(12)
        given = {"answers": answers, "refusals": answers, "original_states": states, "reference": constant}
        given |= {"refusal_reference": constant, "bigrams": bigrams}
        ROWS[name](**{need: given[need] for need in needs(ROWS[name])}).sum().backward()

    assert 0 < most_rows(step) <= 7
    assert model.model.layers[1].mlp.down_proj.weight.grad is not None
    assert most_rows(lambda: model(**batch.inputs)) > 40  # what shows whole logits


def test_no_more_than_a_chunk_is_held_for_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ROWS", 7)
    model = tiny_llama()
    assert 0 < most_rows(lambda: answer_records(model, random_examples(12), 1000, moments=True)) <= 7


def test_a_model_that_does_more_than_project_is_found_out_once() -> None:
    """Gemma 2 caps its logits: one pass too many for a model, then whole logits at once."""
    batch = collate(random_examples(3))
    for name, passes in (("llama", [1, 1]), ("gemma2", [2, 1])):
        model = tiny_model(name)
        counted = []
        model.base_model.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        for expected in passes:
            counted.clear()
            answer_logits(model, batch)
            assert len(counted) == expected
        assert forward._PROJECTS_ONLY[model] == (name == "llama")


def test_a_projection_that_is_trained_gets_its_gradient() -> None:
    model, batch = tiny_llama(), collate(random_examples(3))
    model.requires_grad_(True)
    answer_logits(model, batch)[0].nll_mean.sum().backward()
    mask, targets = tokens.shift(batch.labels)
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    log_p = model(**batch.inputs).logits[mask].log_softmax(-1)
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    lengths = mask.sum(1)
    (nll / lengths.repeat_interleave(lengths)).sum().backward()
    torch.testing.assert_close(found, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_extreme_logits_stay_finite_through_a_projection() -> None:
    states = torch.eye(3).mul(1e4).requires_grad_()
    answers = Answers(states, torch.tensor([0, 1, 1]), torch.zeros(3, dtype=torch.int64), 1, lambda s: s * 1.0)
    values = answers.log_probs
    assert values.tolist() == [0.0, 0.0, -1e4] and max(values.tolist()) <= 0
    values.sum().backward()
    assert states.grad is not None and states.grad.isfinite().all() and not math.isnan(float(states.grad.sum()))
