"""What a model can be evaluated on: a row per suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import muse, own, tofu, wmdp
from .collect import collect
from .evaluation import Evaluation, Record
from .items import EvaluationSet
from .metrics import Score
from .settings import SuiteSettings
from .table import MUSE, TOFU


@dataclass(frozen=True)
class Suite:
    """`load`: settings -> sets. `score`: records of a model, and of a retrained reference or None -> scores.

    `split`: the default of --split. `collect`: what makes the records of a set, called as the one of collect.py.
    """

    title: str
    paper: str | None
    load: Callable[[SuiteSettings], list[EvaluationSet]]
    score: Callable[[Evaluation, Evaluation | None], dict[str, Score]]
    collect: Callable[..., list[Record]] = collect
    split: str | None = None


SUITES = {
    "tofu": Suite("TOFU: fictitious authors", TOFU, tofu.load, tofu.score, split=tofu.SPLIT),
    "muse": Suite("MUSE: news and books", MUSE, muse.load, muse.score, split=muse.SPLIT),
    "wmdp": Suite("WMDP and MMLU: hazardous and general knowledge", wmdp.WMDP, wmdp.load, wmdp.score, wmdp.collect),
    "own": Suite("your own rows", None, own.load, own.score),
}
