"""Hidden states per layer and gradient norms of one example, against transformers and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from architectures import ARCHITECTURES
from conftest import random_examples, tiny_llama
from lorasure.evaluate.inside import gradient_norms, layer_means
from lorasure.evaluate.representation import layer_similarity

EXAMPLES = random_examples(7, seed=5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_layer_means_are_those_of_the_positions_that_predict_the_answer(name: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval().requires_grad_(False)
    found = layer_means(model, EXAMPLES, 1000)
    for i, example in enumerate(EXAMPLES):
        states = model(torch.tensor([example.input_ids]), output_hidden_states=True).hidden_states
        assert len(found) == len(states) == 3  # embeddings and two layers
        for layer, state in zip(found, states, strict=True):
            expected = state[0, example.answer_start - 1 : -1].mean(0)
            assert layer[i] == pytest.approx(expected.numpy(), abs=1e-5)


def test_layer_means_do_not_depend_on_the_batch() -> None:
    model, steps = tiny_llama(), []
    alone = layer_means(model, EXAMPLES, 1, steps.append)
    assert sum(steps) == len(EXAMPLES)
    for one, other in zip(alone, layer_means(model, EXAMPLES, 60), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_change_in_one_layer_shows_from_there_on() -> None:
    model, examples = tiny_llama(layers=3), random_examples(30)
    before = layer_means(model, examples, 1000)
    weight = model.model.layers[1].mlp.down_proj.weight.data
    weight += torch.randn_like(weight)
    scores = [score.value for score in layer_similarity(before, layer_means(model, examples, 1000))]
    assert scores[:2] == pytest.approx([1, 1]) and max(scores[2:]) < 0.95


def test_gradient_norms_are_autograd_s_and_leave_no_trace() -> None:
    """Reference: backward of transformers' own loss, which is the mean over answer tokens."""
    model, steps = tiny_llama(attention_dropout=0.5).train(), []
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    flags = [p.requires_grad for p in model.parameters()]
    found = gradient_norms(model, EXAMPLES, progress=steps.append)
    assert model.training and [p.requires_grad for p in model.parameters()] == flags and len(steps) == len(EXAMPLES)
    assert all(p.grad is None for p in model.parameters())
    chosen = gradient_norms(model, EXAMPLES, [model.lm_head.weight])
    model.eval().requires_grad_(True)
    for i, example in enumerate(EXAMPLES):
        ids = torch.tensor([example.input_ids])
        labels = ids.clone()
        labels[:, : example.answer_start] = -100
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        whole = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert found[i] == pytest.approx(float(whole.norm()), rel=1e-5)
        assert chosen[i] == pytest.approx(float(model.lm_head.weight.grad.norm()), rel=1e-5)


def test_weights_that_an_example_does_not_use_count_as_zero() -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES["mixtral"]().eval().requires_grad_(False)
    spare = torch.nn.Parameter(torch.ones(3))
    model.register_parameter("spare", spare)
    everything = gradient_norms(model, EXAMPLES[:2])
    assert everything == pytest.approx(
        gradient_norms(model, EXAMPLES[:2], [p for p in model.parameters() if p is not spare])
    )
