"""What a search is made of: methods with their ranges, and how trials are drawn, measured and chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

from ..config import ForgetSettings
from ..evaluate.settings import EvaluateSettings

FIELDS = {f.name.rstrip("_"): f.name for f in fields(ForgetSettings)}  # public name -> field


@dataclass(frozen=True)
class Range:
    """Where a setting is looked for: one of `choices`, or from `low` to `high`, whole numbers if both are."""

    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that must be allowed for all to be."""
        return self.choices or (self.low, self.high)


def corners(ranges: Mapping[str, Range], most: int) -> Iterator[dict[str, Any]]:
    """The combinations of the ranges' ends, `most` of them at most."""
    for values in islice(product(*(r.ends for r in ranges.values())), most):
        yield dict(zip(ranges, values, strict=True))


@dataclass(frozen=True)
class Method:
    """A way to forget: its settings (`out` is replaced for every trial) and what is searched of them."""

    settings: ForgetSettings
    ranges: dict[str, Range]

    def at(self, params: Mapping[str, Any], out: Path) -> ForgetSettings:
        """The settings of one trial."""
        return replace(self.settings, **{FIELDS[name]: value for name, value in params.items()}, out=str(out))


@dataclass(frozen=True)
class Spec:
    """A checked SPEC. `evaluation`: how every trial is measured (`out` is replaced)."""

    methods: dict[str, Method]
    trials: int
    sampler: str
    seed: int
    utility_floor: float
    evaluation: EvaluateSettings
    reference: str | None

    @property
    def base(self) -> ForgetSettings:
        """Settings of any method, for what all have in common: model and data."""
        return next(iter(self.methods.values())).settings
