"""What is attacked: a model that can be read anew, the rows it is measured on, and the scores of one measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config import ForgetSettings
from ..data.examples import Row
from ..data.pairing import sample
from .collect import collect
from .evaluation import Evaluation
from .items import EvaluationSet, Generation, Subject
from .metrics import Score
from .settings import AttackSettings
from .tofu import memorisation, set_scores

Scores = dict[str, Score]


@dataclass(frozen=True)
class AttackRows:
    """`forget`: all rows to forget; `order`: their indices, shuffled; `most`: how many of them are measured on."""

    forget: tuple[Row, ...]
    retain: tuple[Row, ...]
    order: tuple[int, ...]
    most: int

    @classmethod
    def draw(cls, forget: Sequence[Row], retain: Sequence[Row], options: AttackSettings) -> AttackRows:
        """Rows in an order that depends on the seed alone. Wrong answers are dropped: no score here needs them."""
        plain = [replace(r, extra={k: v for k, v in r.extra.items() if k == "paraphrased_question"}) for r in forget]
        return cls(tuple(plain), tuple(retain), tuple(sample(len(plain), len(plain), options.seed)), options.rows)

    @property
    def scored(self) -> tuple[int, ...]:
        return self.order[: self.most]

    @property
    def few(self) -> tuple[int, ...]:
        """A tenth, from the other end of the order, so that it is not scored if other rows are left."""
        return self.order[-max(1, round(len(self.order) / 10)) :]

    def pick(self, indices: Sequence[int]) -> list[Row]:
        """The forget rows of some indices."""
        return [self.forget[i] for i in indices]


@dataclass(frozen=True)
class Victim:
    """A model to attack. `load(scale)`: read anew, its adapter scaled and merged; `load_trainable()`: to be trained."""

    name: str
    load: Callable[[float], Any]
    load_trainable: Callable[[], Any]
    has_adapter: bool
    tokenizer: PreTrainedTokenizerBase
    settings: ForgetSettings
    token_budget: int
    rows: AttackRows
    options: AttackSettings

    @cached_property
    def plain(self) -> Subject:
        """The model as it is, kept for the attacks that leave its weights alone."""
        return self.subject(self.load(1.0))

    def release(self) -> None:
        """Give the memory of `plain` back; it would be loaded again."""
        self.__dict__.pop("plain", None)

    def subject(self, model: Any) -> Subject:
        """A model, ready to be measured."""
        return Subject(model, self.tokenizer, self.settings, self.token_budget)

    @property
    def scored(self) -> list[Row]:
        """The rows that attacks are measured on."""
        return self.rows.pick(self.rows.scored)

    def measure(self, subject: Subject, rows: Sequence[Row], *, answered: bool = True, **how: Any) -> Scores:
        """Probability, exact memorisation, extraction strength; ROUGE-L recall of the first rows if `answered`.

        `how`: the `change` and `max_length` of an EvaluationSet.
        """
        sets = {"forget": collect(subject, EvaluationSet("forget", tuple(rows), **how))}
        if answered and self.options.generate_rows:
            few, generation = tuple(rows[: self.options.generate_rows]), Generation(self.options.new_tokens)
            sets["answered"] = collect(subject, EvaluationSet("answered", few, generation, **how))
        found = Evaluation(self.name, {}, sets)
        scores = {"probability": set_scores(found, "forget")["probability"], **memorisation(found, "forget")}
        return scores | ({"rouge": set_scores(found, "answered")["rouge"]} if "answered" in sets else {})
