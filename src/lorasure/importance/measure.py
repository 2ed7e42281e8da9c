"""Importance of every site as one thing that can be measured, stored and used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import artifacts
from ..data.examples import Example
from ..errors import DataError, NumericError, UsageError
from ..forward import Progress
from ..registry import lookup
from ..sites import Site
from .collect import Probe, SetMoments, moments
from .moments import Moments
from .paper_code import EPSILON, paper_moments
from .scores import SCORES, SPACES, Weights, check_pair, site_weights

UNITS = {
    "gradient": "d(mean NLL per answer token of one example, nats) / d(parameter), float32",
    "mean": "E[g] over examples",
    "squares": "sum over examples of (g - E[g])^2",
    "absolute": "E[|g|] over examples",
    "W": "(out, in), gradient of the weight",
    "B": "(out, k), gradient of LoRA's B, scaling included",
    "A": "(k, in), gradient of LoRA's A, scaling included",
    "rows": "(out, k), gradient of the weight times A^T, E[A^T A] = I",
    "columns": "(k, in), B^T times the gradient of the weight, E[B B^T] = I",
}


@dataclass(frozen=True)
class Importance:
    """Gradient moments of the forget and the retain set, and the rule that turns them into weights.

    `about` holds what they were measured on (model and data fingerprints). `floor` is None, or the published epsilon.
    """

    score: str
    probe: Probe
    forget: SetMoments
    retain: SetMoments
    floor: float | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = SCORES[self.score].least if self.floor is None else 1  # the published sums are of the whole set
        for name, measured in (("forget", self.forget), ("retain", self.retain)):
            count = min((m.count for factors in measured.values() for m in factors.values()), default=least)
            if count < least:
                raise UsageError(
                    f"--score {self.score} needs {least} rows of each set, it has {count} of the {name} set. "
                    "Try --score fisher, or a start that measures no importance (--init contrast --coverage 1)."
                )

    def weights(self, site: Site, device: torch.device | None = None) -> Weights:
        """Row, column and block weights of one site, computed on `device` (default: where its moments are)."""
        forget, retain = ({name: m.to(device) for name, m in s[site.name].items()} for s in (self.forget, self.retain))
        return site_weights(self.score, self.probe.space, forget, retain, self.floor)

    def save(self, path: Path) -> None:
        """All moments in one safetensors file; counts, units and what they were measured on go into its header."""
        tensors: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for name, measured in (("forget", self.forget), ("retain", self.retain)):
            for site, factors in measured.items():
                for factor, kept in factors.items():
                    counts[name] = kept.count
                    tensors |= {f"{name}|{site}|{factor}|{moment}": t for moment, t in kept.tensors().items()}
        about = {
            "score": self.score,
            "probe": asdict(self.probe),
            "floor": self.floor,
            "counts": counts,
            "units": UNITS,
        }
        artifacts.write_tensors(path, tensors, about | {"about": self.about})

    @classmethod
    def load(cls, path: Path) -> Importance:
        """What `save` wrote; a DataError for anything else."""
        with artifacts.as_written(path):
            return cls._of(*artifacts.read_tensors(path))

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Importance:
        sets: dict[str, SetMoments] = {"forget": {}, "retain": {}}
        parts: dict[tuple[str, str, str], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, site, factor, moment = key.split("|")
            parts.setdefault((name, site, factor), {})[moment] = tensor
        for (name, site, factor), found in parts.items():
            sets[name].setdefault(site, {})[factor] = Moments(about["counts"][name], **found)
        probe = Probe(**about["probe"])
        return cls(about["score"], probe, sets["forget"], sets["retain"], about["floor"], about["about"])

    def check_reusable(
        self, sites: Sequence[Site], about: dict[str, Any], score: str, probe: Probe, *, paper_code: bool = False
    ) -> None:
        """Refuse importance of another model, data set, layer set or setting, and say which."""
        wanted = {"model and data": about, "--space and probe settings": asdict(probe)}
        found = {"model and data": self.about, "--space and probe settings": asdict(self.probe)}
        for what, value in wanted.items():
            changed = [k for k in value if value[k] != found[what].get(k)]
            if changed:
                raise DataError(f"--importance: measured on another {changed[0]} (of {what}); measure it again.")
        if paper_code != (self.floor is not None):
            raise DataError("--importance: measured with another --compat; measure it again.")
        if paper_code and score != self.score:
            raise DataError(f"--importance: made with --compat paper-code for --score {self.score}; measure it again.")
        missing = [site.name for site in sites if site.name not in self.forget or site.name not in self.retain]
        if missing:
            raise DataError(
                f"--importance: layer {missing[0]} was not measured; measure it again with these --targets."
            )
        for site in sites:
            self._check_moments(site)

    def _check_moments(self, site: Site) -> None:
        """The file may be anybody's: its moments must be finite numbers that fit the layer."""
        shapes = self.probe.shapes(site)
        for measured in (self.forget, self.retain):
            for factor, kept in measured[site.name].items():
                for tensor in kept.tensors().values():
                    if tuple(tensor.shape) != shapes.get(factor) or not tensor.is_floating_point():
                        raise DataError(
                            f"--importance: the moments of layer {site.name} do not fit it; measure it again."
                        )
                    if not torch.isfinite(tensor).all():
                        raise NumericError(f"--importance: the moments of layer {site.name} are not finite.")


def measure(
    model: PreTrainedModel,
    sites: Sequence[Site],
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    score: str,
    probe: Probe,
    token_budget: int,
    paper_code: bool = False,
    about: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Importance:
    """Measure the gradient moments of both sets at every site (VILA arXiv 2508.21300, FILA 2408.06621).

    `score` is a key of SCORES and `probe.space` one of SPACES. `paper_code` follows the public scripts instead.
    """
    lookup(SCORES, score, "--score")
    lookup(SPACES, probe.space, "--space")
    check_pair(score, probe.space)
    if paper_code:
        sets = paper_moments(model, sites, forget, retain, probe, score=score, progress=progress)
        return Importance(score, probe, *sets, floor=EPSILON, about=about or {})
    options: dict[str, Any] = {"token_budget": token_budget, "progress": progress}
    of_forget, of_retain = (on_host(moments(model, sites, rows, probe, **options)) for rows in (forget, retain))
    return Importance(score, probe, of_forget, of_retain, about=about or {})


def on_host(measured: SetMoments) -> SetMoments:
    """The moments in the host's memory: the device has room for those of one set, not of two, in `full` space."""
    cpu = torch.device("cpu")
    return {site: {name: kept.to(cpu) for name, kept in factors.items()} for site, factors in measured.items()}
