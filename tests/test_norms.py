"""One norm in place of a model's: only where it computes the same, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, assert_same_gradients, tiny_model
from lorasure import models
from lorasure.norms import Norm, fuse_norms

FUSED = {"llama": 5, "mistral": 5, "qwen2": 5, "phi3": 5, "mixtral": 5, "qwen2-moe": 5, "qwen3-moe": 9, "gpt-oss": 5}
IDS = torch.arange(40).view(2, 20)


def scattered(name):
    """A tiny model whose norms have weights of their own."""
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def fused(model):
    return [module for module in model.modules() if type(module) is Norm]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_computes_what_it_did_under_the_names_it_had(name):
    model, before = scattered(name), scattered(name)
    with torch.no_grad():
        fuse_norms(model)
        assert len(fused(model)) == FUSED.get(name, 0)  # Gemma adds 1 to its weights; the rest have other norms
        torch.testing.assert_close(model(input_ids=IDS).logits, before(input_ids=IDS).logits, atol=1e-4, rtol=0)
    assert list(model.state_dict()) == list(before.state_dict())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_gradients_are_those_of_before(name):
    model, before = scattered(name), scattered(name)
    fuse_norms(model)
    assert_same_gradients(model, before)


@pytest.mark.parametrize("norm", ["adds one", "other epsilon", "fails alone"])
def test_a_norm_that_computes_something_else_stays(norm):
    model = scattered("llama")
    own = model.model.norm
    if norm == "adds one":
        own.forward = lambda x: nn.functional.rms_norm(x, x.shape[-1:], own.weight + 1, own.variance_epsilon)
    elif norm == "other epsilon":
        own.forward = lambda x: nn.functional.rms_norm(x, x.shape[-1:], own.weight, 2 * own.variance_epsilon)
    else:
        own.forward = lambda x: nn.functional.rms_norm(x, x.shape[2:], own.weight, own.variance_epsilon)
    fuse_norms(model)
    assert model.model.norm is own and len(fused(model)) == 4


@pytest.mark.parametrize("fault", ["other logits", "an error"])
def test_a_model_that_differs_with_them_keeps_all_its_own(fault, monkeypatch):
    """What a try of the norm alone cannot show: here it computes the same of a single vector only."""
    model = scattered("llama")
    own = [type(module) for module in model.modules()]

    def wrong(self, x):
        if x.dim() > 1 and fault == "an error":
            raise RuntimeError
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps) * (1.5 if x.dim() > 1 else 1)

    monkeypatch.setattr(Norm, "forward", wrong)
    fuse_norms(model)
    assert [type(module) for module in model.modules()] == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_what_a_cpu_computes_is_what_pytorch_does(dtype, size):
    """`Scaling` against torch.nn.functional.rms_norm, forward and backward, also where eps takes part."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 3, 8, generator=generator).to(dtype) for _ in range(2))
    norm = Norm(8, 1e-6, dtype=dtype).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    ours, theirs = ((size * x).requires_grad_() for _ in range(2))
    found, expected = norm(ours), nn.functional.rms_norm(theirs, (8,), norm.weight, 1e-6)
    assert type(found.grad_fn).__name__ == "ScalingBackward" and found.dtype == dtype
    found.backward(g)
    expected.backward(g)
    for one, other in ((found, expected), (ours.grad, theirs.grad)):
        scale = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, atol=8 * torch.finfo(dtype).eps * scale, rtol=0)


def test_a_weight_that_is_trained_has_a_gradient():
    norm = Norm(8, 1e-6)
    norm(torch.randn(2, 3, 8)).sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.abs().max() > 0


def test_a_model_that_is_loaded_has_them(model_folder):
    assert fused(models.load_model(str(model_folder), dtype=torch.float32, device=torch.device("cpu")))
