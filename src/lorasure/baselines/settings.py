"""Settings of the commands `ssd`, `task-arithmetic` and `uld`; flags and help texts are made of these fields."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import DataSettings, ExportSettings, OptimizerSettings, OutSettings, Settings, SiteSettings, option


@dataclass(frozen=True, kw_only=True)
class SsdSettings(OutSettings, SiteSettings, DataSettings):
    """All settings of `lorasure ssd`."""

    selection: float = option(
        10.0,
        "weights are dampened whose forget importance is above this many times their retain importance",
        low=0,
    )
    dampening: float = option(
        1.0, "a chosen weight is multiplied by this times retain over forget importance, by 1 at most", low=0
    )
    retain_rows: int | None = option(
        None, "retain rows to measure on, drawn without replacement (default: as many as forget rows)", low=1
    )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(Settings):
    """The adapter that is trained."""

    rank: int = option(8, "rank of the adapter", low=1)
    alpha: float = option(16.0, "scaling of the adapter is alpha / rank", above=0)


@dataclass(frozen=True, kw_only=True)
class TaskArithmeticSettings(
    OutSettings, ExportSettings, OptimizerSettings, AdapterSettings, SiteSettings, DataSettings
):
    """All settings of `lorasure task-arithmetic`."""

    lr: float = option(1e-4, "learning rate; 1e-4 suits models of 1 to 8 B, small ones need more", above=0)
    factor: float = option(1.0, "how many times what was learnt on the forget set is taken away", low=0)


@dataclass(frozen=True, kw_only=True)
class UldSettings(OutSettings, OptimizerSettings, AdapterSettings, SiteSettings, DataSettings):
    """All settings of `lorasure uld`."""

    layers: int | None = option(None, "layers of the assistant, the model's first (default: a quarter of them)", low=1)
    weight: float = option(0.8, "the assistant's logits are subtracted this many times", low=0)
    lambda_: float = option(1.0, "weight of being uniform on the retain rows", low=0)
    lr: float = option(1e-3, "learning rate", above=0)


OTHERS: dict[str, tuple[str, type[OutSettings]]] = {  # command -> what it does, its settings
    "ssd": ("to compare with: dampen the weights that matter to the forget set alone", SsdSettings),
    "task-arithmetic": ("to compare with: learn the forget set, then subtract what was learnt", TaskArithmeticSettings),
    "uld": ("to compare with: subtract the logits of an assistant that knows the forget set", UldSettings),
}
