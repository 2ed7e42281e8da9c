"""Adapters: the only module that touches peft. Attach a start to the untouched base, save, merge, compress.

With a start s B0 A0 the layer must at first compute what it always did, so the adapter has rank 2r:
`[B | -B0] [A ; A0]`, the second half frozen. The base's weights are never changed, not even in memory: disabling the
adapter gives the original model, the trained adapter is at once the plain LoRA adapter to hand over, and a quantised
base needs no special case.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from .errors import UsageError
from .init.low_rank import Factors
from .init.spectral import product_singular
from .lora_product import ADAPTER_NAME, adapted
from .sites import Site

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
Start = Mapping[Site, Factors]


class FrozenTail(nn.Module):
    """A weight whose rank axis is [trainable head | frozen tail].

    `tail` is (outer, rank, inner) and the weight a reshape of (outer, 2 rank, inner): outer is the number of experts
    for A and the number of outputs for B; inner is the number of inputs for A and the number of experts for B.
    """

    tail: Tensor

    def __init__(self, tail: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("tail", tail)
        self.shape = shape

    def forward(self, head: Tensor) -> Tensor:
        return torch.cat([head, self.tail], dim=1).view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        outer, rank, inner = self.tail.shape
        return weight.view(outer, 2 * rank, inner)[:, :rank].contiguous()


def attach(model: PreTrainedModel, start: Start, rank: int, alpha: float, *, compensate: bool) -> PeftModel:
    """Put an adapter on the sites of `start` (site -> Factors of the given rank, scaling alpha / rank).

    `compensate`: add the frozen half that makes the start the identity. Without it the adapter adds s B A. Only the
    trainable factors require a gradient; they are float32 whatever the base's dtype.
    """
    total = 2 * rank if compensate else rank
    wrapped = get_peft_model(model, _config(model, start, total, alpha * total / rank))
    groups = _grouped(start)
    for (module, parameter), experts in groups.items():
        lora_a, lora_b = _layers(wrapped, module, parameter)
        a, b = _stacked(experts, wrapped.get_base_model(), module)
        _place(lora_a, a.to(lora_a.weight.device), a if compensate else None)
        _place(lora_b, b.to(lora_b.weight.device), -b if compensate else None)
        if parameter is None:
            layer: Any = wrapped.get_base_model().get_submodule(module)
            layer.__class__ = adapted(type(layer))
            layer.factors = _trainable(lora_a), _trainable(lora_b), _tail(lora_a), _tail(lora_b)
    return wrapped


def _config(model: PreTrainedModel, sites: Iterable[Site], rank: int, alpha: float) -> LoraConfig:
    """What peft is told, so that it puts an adapter on these sites."""
    modules = list(dict.fromkeys(s.module for s in sites if s.parameter is None))
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=_plain(alpha),
        lora_dropout=0.0,
        target_modules=_module_names(model, modules),
        target_parameters=list(dict.fromkeys(f"{s.module}.{s.parameter}" for s in sites if s.parameter)) or None,
        fan_in_fan_out=any(s.transposed and s.parameter is None for s in sites),
    )


def check_fits(model: PreTrainedModel, sites: Iterable[Site]) -> None:
    """Raise a UsageError unless peft puts an adapter on each of these sites, and reads it back to where it was."""
    if unfit := unfit_sites(model, sites):
        ends = dict.fromkeys(".".join(site.module.split(".")[-2:]) for site in unfit)
        raise UsageError(
            f"Layer '{unfit[0].module}' cannot get an adapter: in {model.config.model_type} models, peft takes its "
            f"name for another's. Leave it out with --exclude {','.join(ends)}."
        )


def unfit_sites(model: PreTrainedModel, sites: Iterable[Site]) -> list[Site]:
    """Those of the sites that peft puts no adapter on, or does not read back to where it was.

    In mixtures peft gives names of linear layers another meaning, that of experts in models of older versions, and
    transformers' renamings may spoil others on the way back. Allocates nothing, leaves no trace.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of layers left out, which the caller tells
            wrapped = get_peft_model(model, _config(model, sites, 1, 1.0), low_cpu_mem_usage=True)
    except ValueError as error:
        raise UsageError(f"--targets: peft cannot adapt these layers: {str(error).splitlines()[0]}") from error
    adapted = {
        (name.removesuffix(".base_layer"), getattr(layer, "parameter_name", None))
        for name, layer in wrapped.get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }
    missing = set_peft_model_state_dict(wrapped, get_peft_model_state_dict(wrapped)).missing_keys
    lost = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in missing if ".lora_" in key}
    wrapped.unload()
    return [s for s in sites if (s.module, s.parameter) not in adapted or s.module in lost]


def _grouped(start: Start) -> dict[tuple[str, str | None], dict[int | None, Factors]]:
    """(module, parameter) -> expert -> factors: peft keeps all experts of a parameter in one pair of layers."""
    groups: dict[tuple[str, str | None], dict[int | None, Factors]] = {}
    for site, factors in start.items():
        groups.setdefault((site.module, site.parameter), {})[site.expert] = factors
    return groups


def _experts(model: nn.Module, module: str) -> int:
    """Number of experts in a mixture module, wrapped by peft or not."""
    layer: Any = model.get_submodule(module)
    return (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).num_experts


def _plain(alpha: float) -> Any:
    """Servers expect a whole alpha as an integer."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _module_names(model: PreTrainedModel, modules: list[str]) -> list[str]:
    """Last name components when they say the same thing as the full names (what other tools show), else full names."""
    ends = sorted({name.rsplit(".", 1)[-1] for name in modules})
    matched = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in ends}
    return ends if matched == set(modules) else modules


def _layers(wrapped: PeftModel, module: str, parameter: str | None) -> tuple[nn.Linear, nn.Linear]:
    """peft's lora_A and lora_B of a site; wrappers for several parameters of one module are nested."""
    layer: Any = wrapped.get_base_model().get_submodule(module)
    while parameter is not None and layer.parameter_name != parameter:
        layer = layer.base_layer
    return layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]


def _stacked(experts: Mapping[int | None, Factors], model: nn.Module, module: str) -> tuple[Tensor, Tensor]:
    """(A, B) as (experts or 1, rank, in) and (out, rank, experts or 1). Experts that are not adapted get zeros.

    Zeros stay zeros: with A = B = 0 neither factor has a gradient.
    """
    if None in experts:
        factors = experts[None]
        return factors.A.float()[None], factors.B.float()[..., None]
    sample = next(iter(experts.values()))
    zero = Factors(torch.zeros_like(sample.B), torch.zeros_like(sample.A))
    ordered = [experts.get(e, zero) for e in range(_experts(model, module))]
    return torch.stack([f.A for f in ordered]).float(), torch.stack([f.B for f in ordered], dim=-1).float()


@torch.no_grad()
def _place(layer: nn.Linear, head: Tensor, tail: Tensor | None) -> None:
    full = head if tail is None else torch.cat([head, tail.to(head.device)], dim=1)
    layer.weight.copy_(full.reshape(layer.weight.shape))
    if tail is not None:
        parametrize.register_parametrization(layer, "weight", FrozenTail(tail.to(layer.weight), layer.weight.shape))


def bake(wrapped: PeftModel, scale: float = 1.0) -> PeftModel:
    """Turn [head | tail] into ordinary weights of rank 2r: from here on it is any PEFT adapter. Training is over.

    `scale`: what it adds to the base is multiplied by, in B, as servers expect a whole alpha.
    """
    module: Any
    for module in wrapped.modules():
        if not hasattr(module, "lora_A"):
            continue
        lora_a, lora_b = module.lora_A[ADAPTER_NAME], module.lora_B[ADAPTER_NAME]
        for layer in (lora_a, lora_b):
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
                layer.weight.requires_grad_(False)
        lora_b.weight.data.mul_(scale)
        if kind := getattr(type(module), "PEFTS", None):
            del module.factors
            module.__class__ = kind
    return wrapped


def _trainable(layer: Any) -> Tensor:
    """The parameter that training changes: the head of a compensated weight, or the weight itself."""
    return layer.parametrizations.weight.original if parametrize.is_parametrized(layer, "weight") else layer.weight


def _tail(layer: Any) -> Tensor | None:
    """The frozen half of a compensated weight."""
    return layer.parametrizations.weight[0].tail if parametrize.is_parametrized(layer, "weight") else None


def _of_site(wrapped: PeftModel, site: Site, take: Callable[[nn.Linear], Tensor]) -> Factors:
    """One site's factors, cut out of what `take` finds in peft's layers."""
    lora_a, lora_b = _layers(wrapped, site.module, site.parameter)
    count = 1 if site.expert is None else _experts(wrapped.get_base_model(), site.module)
    a = take(lora_a).view(count, -1, site.shape[1])
    b = take(lora_b).view(site.shape[0], -1, count)
    expert = site.expert or 0
    return Factors(b[:, :, expert], a[expert])


def trained_factors(wrapped: PeftModel, sites: Iterable[Site]) -> dict[Site, Factors]:
    """Copies of the factors that were trained, without the frozen half."""
    found = {site: _of_site(wrapped, site, _trainable) for site in sites}
    return {site: Factors(f.B.detach().clone(), f.A.detach().clone()) for site, f in found.items()}


def trainable_b(wrapped: PeftModel, site: Site) -> Tensor:
    """The trainable B (out, r) of a site, part of the autograd graph."""
    return _of_site(wrapped, site, _trainable).B


@torch.no_grad()
def set_trained(wrapped: PeftModel, trained: Start) -> None:
    """Load trained factors into an adapter that `attach` made from the same start."""
    for (module, parameter), experts in _grouped(trained).items():
        values = _stacked(experts, wrapped.get_base_model(), module)
        for layer, value in zip(_layers(wrapped, module, parameter), values, strict=True):
            target = _trainable(layer)
            target.copy_(value.reshape(target.shape))


def compress(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of B A of a smaller rank, balanced, and the share of its energy (squared norm) kept.

    No (out, in) matrix is formed (LoRA-Squeeze). Where the rank is above the matrix's smaller side, the components that
    cannot exist are zero.
    """
    u, s, v = product_singular(factors.B, factors.A)
    root = s[:rank].sqrt()
    energy = s.square().sum()
    kept = float(s[:rank].square().sum() / energy) if energy > 0 else 1.0
    b, a = u[:, :rank] * root, (v[:, :rank] * root).T
    missing = rank - len(root)
    return Factors(pad(b, (0, missing)).float(), pad(a, (0, 0, 0, missing)).float()), kept


def compressed(wrapped: PeftModel, sites: Iterable[Site], rank: int) -> tuple[PeftModel, float]:
    """A baked adapter replaced by its best approximation of a smaller rank, and the least energy share of any site."""
    config: Any = wrapped.peft_config[ADAPTER_NAME]
    if not 1 <= rank <= config.r:
        raise UsageError(f"--export-rank must be in [1, {config.r}] (the adapter's exact rank), got {rank}.")
    pairs = {site: compress(_of_site(wrapped, site, lambda layer: layer.weight.detach()), rank) for site in sites}
    scaling = config.lora_alpha / config.r
    base = wrapped.unload()
    smaller = attach(base, {site: f for site, (f, _) in pairs.items()}, rank, scaling * rank, compensate=False)
    return bake(smaller), min(kept for _, kept in pairs.values())


def save_adapter(wrapped: PeftModel, folder: Path, base: str, revision: str | None) -> None:
    """A plain PEFT adapter of a baked model, safetensors, that names its base.

    Embeddings are never adapted; left to itself, peft would look for the base on the hub to find that out.
    """
    config: Any = wrapped.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path, config.revision = base, revision
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """An adapter as any user would load it: nothing of ours is involved."""
    return PeftModel.from_pretrained(model, folder)


def scaled(wrapped: PeftModel, factor: float) -> PeftModel:
    """Multiply what the adapter adds to the base by `factor`, in place: 0 is the base, 1 changes nothing."""
    module: Any
    for module in wrapped.modules():
        if hasattr(module, "lora_A"):
            module.scaling[ADAPTER_NAME] *= factor
    return wrapped


def merge(wrapped: PeftModel) -> PreTrainedModel:
    """The base with the adapter folded into its weights (in memory; the base's files stay as they are)."""
    return wrapped.merge_and_unload()
