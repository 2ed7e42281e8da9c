"""What a model can be evaluated on: a row per suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..config import flag
from ..errors import UsageError
from . import muse, own, tofu, wmdp
from .collect import collect
from .evaluation import Evaluation, Record
from .items import EvaluationSet
from .metrics import Score
from .settings import SuiteSettings
from .table import MUSE, TOFU

NAMING = ("data", "split", "forget", "retain", "holdout")  # settings that name data


@dataclass(frozen=True)
class Suite:
    """`load`: settings -> sets. `score`: records of a model, and of a retrained reference or None -> scores.

    `collect`: what makes the records of a set, called as the one of collect.py. `reads`: the settings that name its
    data. `split`: the default of --split.
    """

    title: str
    paper: str | None
    load: Callable[[SuiteSettings], list[EvaluationSet]]
    score: Callable[[Evaluation, Evaluation | None], dict[str, Score]]
    collect: Callable[..., list[Record]] = collect
    reads: tuple[str, ...] = ("data", "split")
    split: str | None = None

    def sets(self, settings: SuiteSettings) -> list[EvaluationSet]:
        """What is measured. UsageError where the settings name data that this suite does not read."""
        given = [name for name in NAMING if getattr(settings, name) is not None and name not in self.reads]
        if given:
            reads = " and ".join(flag(name) for name in self.reads)
            raise UsageError(f"{flag(given[0])}: --suite {settings.suite} does not read it, but {reads}.")
        return self.load(settings)


SUITES = {
    "tofu": Suite("TOFU: fictitious authors", TOFU, tofu.load, tofu.score, split=tofu.SPLIT),
    "muse": Suite("MUSE: news and books", MUSE, muse.load, muse.score, split=muse.SPLIT),
    "wmdp": Suite(
        "WMDP and MMLU: hazardous and general knowledge", wmdp.WMDP, wmdp.load, wmdp.score, wmdp.collect, ("data",)
    ),
    "own": Suite("your own rows", None, own.load, own.score, reads=own.READS),
}
