"""Model -> records: one forward pass per answer, and, where wanted, an answer in the model's own words."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..config import ModelSettings
from ..data.examples import Example, Row, collate, micro_batches
from ..data.load import encode_rows
from ..errors import DataError
from ..forward import Progress, answer_records, base_of
from ..forward import Record as Measured
from ..memory import within_memory
from .behaviour import compression_ratio, is_refusal, ngram_entropy, repetition
from .evaluation import Record
from .inside import gradient_norms
from .membership import min_k, min_k_plus_plus, zlib_ratio
from .rouge import rouge_l

DEGENERATION = (repetition, ngram_entropy, compression_ratio)
BLOCK = 32  # rows that are measured, generated and written together; it changes speed only


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


@dataclass(frozen=True)
class EvaluationSet:
    """Rows and what to measure on them. Rows may bring `paraphrased_answer` and `perturbed_answer` (a list).

    `membership`: also the values of the membership attacks; `gradient_norm`: that of the gradient among them.
    `max_length`: in tokens, where the suite sets its own.
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


def collect(
    subject: Subject,
    chosen: EvaluationSet,
    done: Collection[int] = (),
    write: Callable[[list[Record]], None] | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """The records of a set except those of the indices `done`, in row order; `write` gets each block when it is ready.

    A block is always made of the same rows, so that records are the same bits whether or not a run was interrupted.
    """
    records: list[Record] = []
    found_items = items(subject, chosen.rows, chosen.max_length)
    for block in _blocks([chosen.change(item) for item in found_items] if chosen.change else found_items):
        if all(item.index in done for item in block):
            found = []
        else:
            found = _measured(subject, block, chosen)
            if chosen.generation:
                for record, more in zip(found, _answered(subject, block, chosen.generation), strict=True):
                    record |= more
            found = [record for record in found if record["row"] not in done]
        if write and found:
            write(found)
        records += found
        if progress:
            progress(len(block))
    return sorted(records, key=lambda record: record["row"])


def _blocks(chosen: Sequence[Item]) -> Iterator[list[Item]]:
    """Longest first, so that rows of a block have similar lengths and too little memory shows at once."""
    ordered = sorted(chosen, key=lambda item: (-item.width, item.index))
    return (ordered[start : start + BLOCK] for start in range(0, len(ordered), BLOCK))


def items(subject: Subject, rows: Sequence[Row], max_length: int | None = None) -> list[Item]:
    """Every row as tokens, its paraphrase and wrong answers too. Running text gives one item per window.

    `max_length`: instead of that of the settings.
    """
    settings = replace(subject.settings, max_length=max_length) if max_length else subject.settings
    variants, sizes = [], []
    for row in rows:
        wrong = row.extra.get("perturbed_answer", [])
        if not isinstance(wrong, list):
            raise DataError(f"{row.place}: 'perturbed_answer' must be a list of wrong answers.")
        answers = [row.answer, str(row.extra.get("paraphrased_answer", row.answer)), *map(str, wrong)]
        # Without wrong answers there is nothing to compare a paraphrase with; running text has neither.
        variants += [replace(row, answer=answer) for answer in (answers if wrong else answers[:1])]
        sizes.append(len(answers) if wrong else 1)
    encoded = encode_rows(variants, settings, subject.tokenizer)
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


def _item(index: int, row: Row, example: Example, others: Sequence[Example], tokenizer: Any) -> Item:
    question, answer, said = row.prompt, row.answer, json.dumps([row.kind, row.prompt, row.messages, row.answer])
    if row.kind == "text":
        half = max(1, len(example) // 2) if not example.answer_start else example.answer_start
        question, answer = (tokenizer.decode(ids, skip_special_tokens=True) for ids in _halves(example, half))
        said = json.dumps([question, answer])
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    return Item(index, digest, example, question, answer, others[0] if others else None, tuple(others[1:]))


def _halves(example: Example, at: int) -> tuple[list[int], list[int]]:
    return list(example.input_ids[:at]), list(example.input_ids[at:])


def _measured(subject: Subject, block: Sequence[Item], chosen: EvaluationSet) -> list[Record]:
    """Likelihoods of the block's answers. A paraphrase that is the answer itself is not run twice."""
    began = time.perf_counter()
    sequences: list[Example] = []
    for item in block:
        sequences += [item.example, *([item.paraphrase] if _own_paraphrase(item) else []), *item.wrong]
    found, subject.token_budget = within_memory(
        lambda tokens: answer_records(subject.model, sequences, tokens),
        subject.token_budget,
        [len(e) for e in sequences],
        "evaluate",
        subject.guards.append,
    )
    measured = iter(found)
    records = []
    for item in block:
        true = next(measured)
        record: Record = {"row": item.index, "id": item.id, "tokens": true.tokens, "nll": true.mean_nll}
        record["correct"] = "".join("01"[flag] for flag in true.correct)
        if item.wrong:
            record["paraphrase_nll"] = next(measured).mean_nll if _own_paraphrase(item) else true.mean_nll
            record["wrong_nll"] = [next(measured).mean_nll for _ in item.wrong]
        if chosen.membership:
            record |= _membership(item, true, subject.tokenizer.eos_token_id)
        if chosen.gradient_norm:
            [record["gradient_norm"]] = gradient_norms(subject.model, [item.example])
        if subject.keep_text:
            record["text"] = {"question": item.question, "answer": item.answer}
        records.append(record)
    _add_time(subject, "likelihood", began)
    return records


def _membership(item: Item, measured: Measured, end: Any) -> Record:
    """Values of the membership attacks. They ask about the text itself, so its end-of-text token is left out."""
    count = measured.tokens - (item.example.input_ids[-1] == end and measured.tokens > 1)
    log_probs, expected, variance = (
        [column[:count]] for column in (measured.log_probs, measured.expected, measured.variance)
    )
    return {
        "min_k": float(min_k(log_probs)[0]),
        "min_k_plus_plus": float(min_k_plus_plus(log_probs, expected, variance)[0]),
        "zlib": float(zlib_ratio(log_probs, [item.answer])[0]),
    }


def _own_paraphrase(item: Item) -> bool:
    return item.paraphrase is not None and item.paraphrase.input_ids != item.example.input_ids


def _answered(subject: Subject, block: Sequence[Item], generation: Generation) -> list[Record]:
    """Fields of the generated answers."""
    began = time.perf_counter()
    prompts = [item.prompt for item in block]
    lengths = [len(prompt) + generation.new_tokens for prompt in prompts]

    def attempt(token_budget: int) -> list[tuple[str, int]]:
        said: dict[int, tuple[str, int]] = {}
        for group in micro_batches(lengths, token_budget):
            said |= zip(group, generate(subject, [prompts[i] for i in group], generation), strict=True)
        return [said[i] for i in range(len(block))]

    whole = len(block) * max(lengths)
    answers, _ = within_memory(attempt, whole, lengths, "generate", subject.guards.append)
    records = []
    for item, (text, tokens) in zip(block, answers, strict=True):
        expected = item.answer
        if generation.clip:
            start = item.example.answer_start
            ids = list(item.example.input_ids[start : start + generation.new_tokens])
            expected = str(subject.tokenizer.decode(ids, skip_special_tokens=True))
        recall, f1 = rouge_l(expected, text, stem=generation.stem)
        record: Record = {"rouge_recall": recall, "rouge_f1": f1, "refused": int(is_refusal(text))}
        record |= {f.__name__: f(text) for f in DEGENERATION} | {"generated_tokens": tokens}
        if subject.keep_text:
            record["text"] = {"question": item.question, "answer": item.answer, "generated": text}
        records.append(record)
    _add_time(subject, "generation", began)
    return records


def _add_time(subject: Subject, name: str, began: float) -> None:
    subject.seconds[name] = subject.seconds.get(name, 0.0) + time.perf_counter() - began


@torch.no_grad()
def generate(
    subject: Subject, prompts: Sequence[Example], generation: Generation, **sampling: Any
) -> list[tuple[str, int]]:
    """(text, number of tokens) of the model's answer to each prompt, batched, with a key-value cache.

    Greedy, or as `sampling` (do_sample, temperature, num_return_sequences; then as many answers per prompt) says.
    """
    tokenizer, model = subject.tokenizer, base_of(subject.model)
    batch = collate(prompts, side="left").to(model.device)
    generated = subject.model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=generation.new_tokens,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
        **({"do_sample": False} | sampling),
    )
    found = []
    for ids in generated[:, batch.input_ids.shape[1] :].tolist():
        own = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        text = str(tokenizer.decode(own, skip_special_tokens=True))
        cut = min((at for stop in generation.stop if (at := text.find(stop)) >= 0), default=len(text))
        found.append((text[:cut].strip(), len(own)))
    return found
