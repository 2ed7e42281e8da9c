"""Position embeddings in fewer operations: only where a model computes the same, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.llama import modeling_llama

from architectures import ARCHITECTURES, assert_same_gradients, tiny_model
from lorasure import models
from lorasure.rotations import NAME, Rotation, fuse_rotations, rotate

OWN = {"gpt2", "gpt-neox", "opt", "gpt-oss"}  # learned positions, or another function
IDS = torch.arange(40).view(2, 20)


def kinds(model):
    return [type(module) for module in model.modules()]


def changed(model, before):
    return sum(one is not other for one, other in zip(kinds(model), before, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_computes_what_it_did(name):
    model, before = tiny_model(name), tiny_model(name)
    fuse_rotations(model)
    assert changed(model, kinds(before)) == (0 if name in OWN else 2)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, before(input_ids=IDS).logits, atol=1e-5, rtol=0)
    assert [kind.__name__ for kind in kinds(model)] == [kind.__name__ for kind in kinds(before)]
    assert all(isinstance(one, type(other)) for one, other in zip(model.modules(), before.modules(), strict=True))


@pytest.mark.parametrize("name", ["llama", "phi"])  # all of a head, and a part of it
def test_gradients_are_those_of_before(name):
    model, before = tiny_model(name), tiny_model(name)
    fuse_rotations(model)
    assert_same_gradients(model, before)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_gradient_is_that_of_what_is_computed(dim):
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64)

    q, k, cos, sin = draw(2, 3, 3, 8), draw(2, 3, 3, 8), draw(2, 3, 8), draw(2, 3, 8)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, dim)
    torch.testing.assert_close(rotate(q, k, cos, sin, dim), expected, atol=1e-14, rtol=0)
    assert torch.autograd.gradcheck(Rotation.apply, (q.requires_grad_(), cos.unsqueeze(dim), sin.unsqueeze(dim)))


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    """Neighbours are turned with each other, as in GPT-J."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turned = [torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k)]
    return q * cos + turned[0] * sin, k * cos + turned[1] * sin


def scaled(q, k, cos, sin, unsqueeze_dim=1, scale=2.0):
    return rotate(q * scale, k, cos, sin, unsqueeze_dim)


@pytest.mark.parametrize("own", [interleaved, scaled, lambda q, k, cos, sin: rotate(q, k, cos, sin)])
def test_another_function_stays(own, monkeypatch):
    monkeypatch.setattr(modeling_llama, NAME, own)
    model = tiny_model("llama")
    before = kinds(model)
    fuse_rotations(model)
    assert not changed(model, before)


def test_a_model_that_differs_with_it_keeps_its_own():
    """What a try of the function cannot show: here it is given part of a head, and leaves the rest as it is."""
    model, before = (tiny_model("phi3", hidden_size=32, partial_rotary_factor=0.5) for _ in range(2))
    fuse_rotations(model)
    assert not changed(model, kinds(before))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, before(input_ids=IDS).logits, atol=0, rtol=0)


def test_other_models_and_copies(model_folder):
    """One that is loaded has it, a copy keeps it, and other models of the process are as they were written."""
    loaded = models.load_model(str(model_folder), dtype=torch.float32, device=torch.device("cpu"))
    other = tiny_model("llama")
    assert changed(loaded, kinds(other)) >= 2
    assert kinds(copy.deepcopy(loaded)) == kinds(loaded)
    assert modeling_llama.apply_rotary_pos_emb is not rotate
    assert modeling_llama.LlamaAttention in kinds(other)
