"""The adapted layer as one step of autograd: peft's own values and gradients, on whatever base, and nothing kept."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer

from architectures import ARCHITECTURES, tiny_model
from lorasure import lora
from lorasure.lora_product import LoraProduct
from lorasure.sites import all_sites
from test_lora import ALPHA, IDS, RANK, SCALING, logits, random_start, relative, trainable


def tensors(dtype: torch.dtype = torch.float64, seed: int = 0, tokens: int = 5) -> list[torch.Tensor]:
    """x, y, weight, bias, A, B, A0, -B0 for 3 inputs, 4 outputs and rank 2."""
    shapes = [(2, tokens, 3), (2, tokens, 4), (4, 3), (4,), (1, 2, 3), (4, 2, 1), (1, 2, 3), (4, 2, 1)]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_hand(x, y, weight, bias, a, b, a0, b0, scaling):
    """The same in plain autograd."""
    y = torch.nn.functional.linear(x, weight, bias) if y is None else y
    extra = x @ a[0].T @ b[..., 0].T
    return y + scaling * (extra if a0 is None else extra + x @ a0[0].T @ b0[..., 0].T)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1)], ids=["as it comes", "swapped", "by feature"])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("own", [True, False], ids=["its own product", "an output given"])
def test_values_and_slopes_however_they_lie_in_memory(own: bool, tail: bool, order: tuple[int, ...]) -> None:
    x, y, weight, bias, a, b, a0, b0 = tensors()
    back = sorted(range(3), key=order.__getitem__)
    x, y = (tensor.permute(order).contiguous().permute(back) for tensor in (x, y))
    assert x.is_contiguous() == y.is_contiguous() == (order == (0, 1, 2))
    leaves = [x, a, b] if own else [x, a, b, y]

    def whole(function, x, a, b, y=None):
        rest = (weight, bias) if own else (None, None)
        return function(x, y, *rest, a, b, *((a0, b0) if tail else (None, None)), 1.7)

    leaves = [leaf.clone().requires_grad_() for leaf in leaves]  # a clone lies as it did
    torch.testing.assert_close(whole(LoraProduct.apply, *leaves), whole(by_hand, *leaves))
    assert torch.autograd.gradcheck(lambda *leaves: whole(LoraProduct.apply, *leaves), leaves)


def test_factors_keep_float32_beside_a_half_precision_base() -> None:
    """A change of A far below bfloat16's rounding of A shows: the two halves are subtracted in float32."""
    x, _, weight, _, a, b, _, _ = tensors(torch.float32, tokens=200)
    x, weight, moved = x.bfloat16(), torch.zeros_like(weight).bfloat16(), a * (1 + 2**-12)
    found = LoraProduct.apply(x, None, weight, None, moved.requires_grad_(), b, a, -b, 1.0)
    assert found.dtype == torch.bfloat16
    expected = by_hand(x.double(), None, weight.double(), None, moved.double(), b.double(), a.double(), -b.double(), 1)
    assert relative(found.detach().double(), expected.detach()) < 0.01
    found.float().square().sum().backward()
    assert moved.grad is not None and moved.grad.dtype == torch.float32


def plain_peft(wrapped):
    """The same adapter with peft's own forward."""
    other = copy.deepcopy(wrapped)
    for module in other.modules():
        if isinstance(module, LoraLayer):
            module.__class__ = getattr(type(module), "PEFTS", type(module))
    return other


def loss_and_gradients(wrapped):
    found = wrapped(input_ids=IDS, use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainable(wrapped).items() if p.grad is not None}


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_peft(name: str, compensate: bool) -> None:
    model = tiny_model(name)
    mine = lora.attach(model, random_start(all_sites(model)), RANK, ALPHA, compensate=compensate)
    other = plain_peft(mine)
    loss, gradients = loss_and_gradients(mine)
    expected, references = loss_and_gradients(other)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == references.keys() and len(gradients) > 2
    scale = max(float(g.abs().max()) for g in references.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, references[key], rtol=1e-5, atol=1e-5 * scale)


def test_the_shortcut_is_taken_and_gone_after_baking(llama) -> None:
    wrapped = lora.attach(llama, random_start(all_sites(llama)), RANK, ALPHA, compensate=True)
    expected = logits(wrapped)
    nodes, seen = [wrapped(input_ids=IDS).logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    names = [type(node).__name__ for node in seen]
    assert names.count("LoraProductBackward") == len(trainable(wrapped)) // 2 == 14
    lora.bake(wrapped)
    assert not any(hasattr(type(m), "PEFTS") for m in wrapped.modules())
    assert relative(logits(wrapped), expected) < 1e-5


def test_a_scaled_adapter_and_a_layer_replaced_by_another_are_followed(llama) -> None:
    """Scaling is read at every call; a base layer that is not a plain linear one is called, never its weight."""
    wrapped = lora.attach(llama, random_start(all_sites(llama)), RANK, ALPHA, compensate=False)

    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.get_base_layer().__class__ = Doubled
    lora.scaled(wrapped, 0.5)
    assert relative(logits(wrapped), logits(plain_peft(wrapped))) < 1e-5
    assert next(m for m in wrapped.modules() if isinstance(m, LoraLayer)).scaling["default"] == SCALING / 2
