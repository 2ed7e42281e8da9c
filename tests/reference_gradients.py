"""Gradients of an example's loss by transformers and automatic differentiation alone, for models of four kinds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from architectures import MIXTURE, tiny_model
from lorasure.data.examples import Example
from lorasure.sites import Site

KINDS = ("llama", "gpt2", "phi3", "mixtral")  # grouped queries, W as (in, out), fused projections, experts


def tiny_mixtral() -> PreTrainedModel:
    """Experts as slices of one parameter, of which the last gets no token.

    Its row of the router lies between rows 0 and 1, which have near twins in rows 3 and 4: two others are above it.
    """
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**MIXTURE | {"num_local_experts": 6}))
    with torch.no_grad():
        for layer in model.model.layers:
            rows = layer.mlp.gate.weight  # (experts, hidden)
            rows[3:5] = rows[0:2] + 0.01 * rows[2]
            rows[5] = rows[0:2].mean(0)
    return model


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model, frozen, in evaluation mode; experts run through the layer's own code (`eager`)."""
    if name != "mixtral":
        return tiny_model(name, dtype)
    model = tiny_mixtral().to(dtype).eval().requires_grad_(False)
    model.set_experts_implementation("eager")
    return model


def nll(model: PreTrainedModel, parameters: dict[str, Tensor], example: Example) -> Tensor:
    """Mean NLL per answer token of one unpadded example, by transformers alone, with some parameters replaced."""
    ids = torch.tensor([example.input_ids])
    logits = functional_call(model, parameters, kwargs={"input_ids": ids, "use_cache": False}).logits[0]
    first = max(example.answer_start, 1)
    return torch.nn.functional.cross_entropy(logits[first - 1 : -1], ids[0, first:])


def parameter_name(site: Site) -> str:
    return f"{site.module}.{site.parameter or 'weight'}"


def of_site(site: Site, stored: Tensor) -> Tensor:
    """W (out, in) of the site from the parameter that holds it."""
    matrix = stored if site.expert is None else stored[site.expert]
    return matrix.T if site.transposed else matrix


def full_gradients(model: PreTrainedModel, sites: Sequence[Site], examples: Sequence[Example]) -> dict[str, Tensor]:
    """d(mean NLL)/dW by automatic differentiation, one example at a time: site name -> (examples, out, in)."""
    names = sorted({parameter_name(site) for site in sites})
    leaves = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in names}
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for example in examples:
        loss = nll(model, leaves, example)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        by_name = dict(zip(leaves, grads, strict=True))
        for site in sites:
            found[site.name].append(of_site(site, by_name[parameter_name(site)]))
    return {name: torch.stack(values) for name, values in found.items()}
