"""What a model can be evaluated on: a row per suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import muse, own, tofu
from .collect import EvaluationSet
from .evaluation import Evaluation
from .metrics import TOFU, Score
from .settings import SuiteSettings


@dataclass(frozen=True)
class Suite:
    """`load`: settings -> sets. `score`: records of a model, and of a retrained reference or None -> scores."""

    title: str
    paper: str | None
    load: Callable[[SuiteSettings], list[EvaluationSet]]
    score: Callable[[Evaluation, Evaluation | None], dict[str, Score]]


SUITES = {
    "tofu": Suite("TOFU: fictitious authors", TOFU, tofu.load, tofu.score),
    "muse": Suite("MUSE: news and books", muse.MUSE, muse.load, muse.score),
    "own": Suite("your own rows", None, own.load, own.score),
}
