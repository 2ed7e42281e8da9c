"""Sites: the linear maps an adapter can sit on, and their weights.

A site is one matrix W of shape (out, in): a linear layer, GPT-2's Conv1D (stored transposed), a fused qkv projection,
or one expert of a mixture that keeps all experts in a single 3-D parameter.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import processes
from .errors import UsageError
from .tried import tried

EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Site:
    """One matrix of the model. `parameter` and `expert` are set when it is a slice of a 3-D expert parameter."""

    module: str
    shape: tuple[int, int]  # (out, in)
    transposed: bool = False  # stored as (in, out)
    parameter: str | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        return self.module if self.parameter is None else f"{self.module}.{self.parameter}[{self.expert}]"

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def all_sites(model: PreTrainedModel) -> list[Site]:
    """Every linear map of the model except the projection to the vocabulary, in the model's order.

    Maps to a single number (the gates of shared experts) are left out: there is nothing of lower rank to put there. So
    are layers that derive from a linear one and compute something else: routers, products by groups of features.
    """
    head = model.get_output_embeddings()
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            sites.append(Site(name, (module.nf, module.nx), transposed=True))
        elif isinstance(module, nn.Linear) and module is not head and _multiplies(module):
            sites.append(Site(name, (module.out_features, module.in_features)))
        elif _holds_experts(module):
            sites += _expert_sites(name, module)
    return [site for site in sites if min(site.shape) > 1]


def _multiplies(module: nn.Linear) -> bool:
    """Whether a linear layer gives (..., out) of (..., in), where a model wrote it anew: tried on shapes alone."""
    if not type(module).__module__.startswith("transformers.models."):
        return True
    weights = {name: torch.empty_like(p, device="meta") for name, p in module.named_parameters()}
    x = torch.empty(7, module.in_features, device="meta", dtype=module.weight.dtype)
    found = tried(lambda: functional_call(module, weights, (x,)))
    return isinstance(found, Tensor) and found.shape == (7, module.out_features)


def find_sites(model: PreTrainedModel, targets: Sequence[str] = ("all",), exclude: Sequence[str] = ()) -> list[Site]:
    """The sites whose name matches a pattern of `targets` and none of `exclude`.

    A pattern is a site's name, or a shell-style glob compared with the whole name or with its end: `q_proj`,
    `layers.3.*`, `*.mlp.*`; `all` stands for every site. A pattern that matches nothing is an error, because a misspelt
    target would silently be left out.
    """
    sites = all_sites(model)
    ends = ", ".join(sorted({site.module.rsplit(".", 1)[-1] for site in sites}))
    if "all" in targets and (unseen := _unseen(model)):
        raise UsageError(
            f"--targets all would leave out {unseen}: it keeps several matrices in one parameter in a form that no "
            f"adapter fits. Name the layers to adapt; they end in: {ends}."
        )
    for pattern in (*targets, *exclude):
        if pattern != "all" and not any(_matches(site, pattern) for site in sites):
            raise UsageError(f"No linear layer matches '{pattern}' in --targets/--exclude. Layers end in: {ends}.")
    found = [
        site
        for site in sites
        if any(p == "all" or _matches(site, p) for p in targets) and not any(_matches(site, p) for p in exclude)
    ]
    if not found:
        raise UsageError("--targets and --exclude leave no layer to adapt.")
    return found


def _matches(site: Site, pattern: str) -> bool:
    names = (site.module, site.name, f"{site.module}.{site.parameter}")
    if any(f".{n}".endswith(f".{pattern}") for n in names):  # literally: a glob would read `[3]` as a set of letters
        return True
    return any(fnmatch.fnmatchcase(n, p) for n in names for p in (pattern, f"*.{pattern}"))


def _holds_experts(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "num_experts")


def _unseen(model: PreTrainedModel) -> str | None:
    """The class of a layer with matrices that `all_sites` does not know (experts of another form), if there is one."""
    for module in model.modules():
        stacked = any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))
        if stacked and not _holds_experts(module) and not isinstance(module, nn.Conv1d):
            return type(module).__name__
    return None


def _expert_sites(name: str, module: nn.Module) -> list[Site]:
    sites = []
    for parameter in EXPERT_PARAMETERS:
        weight = getattr(module, parameter, None)
        if weight is None:
            continue
        shape = (weight.shape[2], weight.shape[1]) if module.is_transposed else (weight.shape[1], weight.shape[2])
        sites += [Site(name, shape, bool(module.is_transposed), parameter, e) for e in range(weight.shape[0])]
    return sites


def grouped(sites: Iterable[Site], size: Callable[[Site], int], room: int) -> Iterator[list[Site]]:
    """All sites in their order, in groups of as many neighbours as fit into `room` together, one at least."""
    group: list[Site] = []
    taken = 0
    for site in sites:
        own = size(site)
        if group and taken + own > room:
            yield group
            group, taken = [], 0
        group.append(site)
        taken += own
    if group:
        yield group


@torch.no_grad()
def weight(model: PreTrainedModel, site: Site) -> Tensor:
    """W (out, in) as float32; a quantised base is dequantised."""
    module = model.get_submodule(site.module)
    if site.parameter is None:
        stored = processes.whole(dequantize_module_weight(module))
    else:
        stored = processes.whole(getattr(module, site.parameter))[site.expert]
    return (stored.T if site.transposed else stored).detach().float()


@torch.no_grad()
def set_weight(model: PreTrainedModel, site: Site, value: Tensor) -> None:
    """Write W (out, in) into the model, in place and in the dtype of its weights. Not for a quantised base."""
    module = model.get_submodule(site.module)
    stored: Any = module.weight if site.parameter is None else getattr(module, site.parameter)[site.expert]
    if not stored.is_floating_point():
        raise UsageError(f"Layer '{site.name}' holds {stored.dtype} weights, which cannot be changed.")
    (stored.T if site.transposed else stored).copy_(value)
