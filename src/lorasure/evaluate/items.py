"""What is measured: sets of rows, a model, and the rows as tokens for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from ..config import ModelSettings
from ..data.examples import Example, Row
from ..data.load import encode_rows, hash_of
from ..data.rows import brought_paraphrase, brought_wrong

UNCUT = 1 << 16  # tokens: nothing is cut


@dataclass(frozen=True)
class Generation:
    """How the model answers: greedy, at most `new_tokens`, cut before the first of `stop`.

    And how that is compared: `stem` lets ROUGE compare stems of words, `clip` takes only the first `new_tokens` tokens
    of the true answer.
    """

    new_tokens: int = 200
    stop: tuple[str, ...] = ()
    stem: bool = True
    clip: bool = False


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Rows and what to measure on them. Rows may bring `paraphrased_answer` and `perturbed_answer` (a list).

    `membership`: also the values of the membership attacks; `gradient_norm`: that of the gradient among them.
    `max_length`: in tokens, where the suite sets its own; UNCUT: also of what is longer than the model takes.
    `change`: what is done to every item before it is measured, its tokens included.
    """

    name: str
    rows: tuple[Row, ...]
    generation: Generation | None = None
    membership: bool = False
    gradient_norm: bool = False
    max_length: int | None = None
    change: Callable[[Item], Item] | None = None


@dataclass
class Subject:
    """The model to be measured, and how text becomes tokens for it.

    `base`: the fingerprint of the model without its adapter. `seconds` adds up the time of each measure, `guards` says
    when memory ran out; `token_budget` is then smaller.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    settings: ModelSettings
    token_budget: int
    keep_text: bool = False
    base: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    guards: list[dict[str, Any]] = field(default_factory=list)
    encoded: WeakKeyDictionary[EvaluationSet, list[Item]] = field(default_factory=WeakKeyDictionary, init=False)

    def items(self, chosen: EvaluationSet) -> list[Item]:
        """`items` of the rows of a set, made once; without its `change`."""
        if chosen not in self.encoded:
            self.encoded[chosen] = items(self, chosen.rows, chosen.max_length)
        return self.encoded[chosen]


@dataclass(frozen=True)
class Item:
    """A record to be: an example and the same prompt with other answers. `answer` is the text for ROUGE."""

    index: int
    id: str
    example: Example
    question: str
    answer: str
    paraphrase: Example | None
    wrong: tuple[Example, ...]

    @property
    def prompt(self) -> Example:
        """What the model is given to answer; running text is given its first half."""
        start = self.example.answer_start or max(1, len(self.example) // 2)
        return replace(self.example, input_ids=self.example.input_ids[:start], answer_start=start)

    @property
    def width(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, (self.example, *self.wrong)))


def items(subject: Subject, rows: Sequence[Row], max_length: int | None = None) -> list[Item]:
    """Every row as tokens, its paraphrase and wrong answers too. Running text gives one item per window.

    `max_length`: instead of that of the settings.
    """
    settings = replace(subject.settings, max_length=max_length) if max_length else subject.settings
    variants, sizes = [], []
    for row in rows:
        wrong = [] if row.kind == "text" else brought_wrong(row)
        paraphrase = brought_paraphrase(row)
        answers = [row.answer, paraphrase if paraphrase.strip() else row.answer, *wrong]
        # Without wrong answers there is nothing to compare a paraphrase with; running text has no question for either.
        variants += [replace(row, answer=answer) for answer in (answers if wrong else answers[:1])]
        sizes.append(len(answers) if wrong else 1)
    encoded = encode_rows(variants, settings, subject.tokenizer, fit=max_length != UNCUT)
    examples: list[list[Example]] = [[] for _ in variants]
    for example, variant in zip(encoded.examples, encoded.rows, strict=True):
        examples[variant].append(example)
    found: list[Item] = []
    place = 0
    for row, size in zip(rows, sizes, strict=True):
        own, others = examples[place], [e[0] for e in examples[place + 1 : place + size]]
        place += size
        for example in own:
            found.append(_item(len(found), row, example, others, subject.tokenizer))
    return found


def measured_hash(items: Sequence[Item]) -> str:
    """sha256 over all that is measured of the items: what the ids of records leave out are wrong answers and cuts."""
    examples = (e for item in items for e in (item.example, item.paraphrase, *item.wrong) if e is not None)
    return hash_of([e.answer_start, *e.input_ids] for e in examples)


def _item(index: int, row: Row, example: Example, others: Sequence[Example], tokenizer: Any) -> Item:
    question, answer, said = row.prompt, row.answer, json.dumps([row.kind, row.prompt, row.messages, row.answer])
    if row.messages:
        question = row.messages[-1]["content"]
    if row.kind == "text":
        half = max(1, len(example) // 2) if not example.answer_start else example.answer_start
        question, answer = (tokenizer.decode(ids, skip_special_tokens=True) for ids in _halves(example, half))
        said = json.dumps([question, answer])
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    return Item(index, digest, example, question, answer, others[0] if others else None, tuple(others[1:]))


def _halves(example: Example, at: int) -> tuple[list[int], list[int]]:
    return list(example.input_ids[:at]), list(example.input_ids[at:])
