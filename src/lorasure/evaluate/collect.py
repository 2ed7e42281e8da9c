"""Model -> records: one forward pass per answer, and, where wanted, an answer in the model's own words."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import GenerationConfig

from ..data.examples import Example, collate, micro_batches
from ..data.load import takes
from ..forward import Progress, answer_records, base_of
from ..forward import Record as Measured
from ..memory import within_memory
from .behaviour import compression_ratio, is_refusal, ngram_entropy, repetition
from .evaluation import Record
from .inside import gradient_norms
from .items import EvaluationSet, Generation, Item, Subject
from .membership import min_k, min_k_plus_plus, zlib_ratio
from .rouge import rouge_l

DEGENERATION = (repetition, ngram_entropy, compression_ratio)
BLOCK = 32  # rows that are measured, generated and written together; it changes speed only


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
    found = subject.items(chosen)
    found = [chosen.change(item) for item in found] if chosen.change else found
    # Longest first, so that rows of a block have similar lengths and too little memory shows at once.
    ordered = sorted(found, key=lambda item: (-item.width, item.index))

    def measure(block: Sequence[Item]) -> list[Record]:
        records = _measured(subject, block, chosen)
        if chosen.generation:
            for record, more in zip(records, _answered(subject, block, chosen.generation), strict=True):
                record |= more
        return records

    return by_blocks(cut(ordered, BLOCK), measure, done, write, progress)


def cut(ordered: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Parts of `size`, in order."""
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def by_blocks(
    blocks: Iterable[Sequence[Item]],
    measure: Callable[[Sequence[Item]], list[Record]],
    done: Collection[int],
    write: Callable[[list[Record]], None] | None,
    progress: Progress | None,
) -> list[Record]:
    """`collect`, given how a block is measured. One of which every index is done is left out."""
    records: list[Record] = []
    for block in blocks:
        found: list[Record] = []
        if not all(item.index in done for item in block):
            found = [record for record in measure(block) if record["row"] not in done]
        if write and found:
            write(found)
        records += found
        if progress:
            progress(len(block))
    return sorted(records, key=lambda record: record["row"])


def _measured(subject: Subject, block: Sequence[Item], chosen: EvaluationSet) -> list[Record]:
    """Likelihoods of the block's answers. A paraphrase that is the answer itself is not run twice."""
    began = time.perf_counter()
    sequences: list[Example] = []
    for item in block:
        sequences += [item.example, *([item.paraphrase] if _own_paraphrase(item) else []), *item.wrong]
    found, subject.token_budget = within_memory(
        lambda tokens: answer_records(subject.model, sequences, tokens, moments=chosen.membership),
        subject.token_budget,
        [len(e) for e in sequences],
        "evaluate",
        subject.guards.append,
    )
    measured, end = iter(found), subject.tokenizer.eos_token_id
    records = []
    for item in block:
        true = next(measured)
        record: Record = {"row": item.index, "id": item.id, "tokens": true.tokens, "nll": true.mean_nll}
        record["correct"] = "".join("01"[flag] for flag in own_text(true, item.example, end).correct)
        if item.wrong:
            record["paraphrase_nll"] = next(measured).mean_nll if _own_paraphrase(item) else true.mean_nll
            record["wrong_nll"] = [next(measured).mean_nll for _ in item.wrong]
        if chosen.membership:
            record |= _membership(item, _without_end(true, item.example, end), subject.tokenizer)
        if chosen.gradient_norm:
            [record["gradient_norm"]] = gradient_norms(subject.model, [item.example])
        if subject.keep_text:
            record["text"] = {"question": item.question, "answer": item.answer}
        records.append(record)
    add_time(subject, "likelihood", began)
    return records


def own_text(measured: Measured, example: Example, end: Any) -> Measured:
    """The record; that of a fragment of text without its end-of-text token, with which the text itself does not end."""
    return _without_end(measured, example, end) if example.fragment else measured


def _without_end(measured: Measured, example: Example, end: Any) -> Measured:
    """The record without its end-of-text token, if it has one and any other."""
    if example.input_ids[-1] != end or measured.tokens == 1:
        return measured
    return Measured(*(getattr(measured, column.name)[:-1] for column in fields(measured)))


def _membership(item: Item, text: Measured, tokenizer: Any) -> Record:
    """Values of the membership attacks, which ask about the text itself: the record is without its end."""
    own, answer = item.example, item.answer
    # Of a cut answer only a part is measured, of the first window of running text more than the half that is asked for.
    if own.input_ids[-1] != tokenizer.eos_token_id or not own.answer_start:
        answer = tokenizer.decode(own.input_ids[own.answer_start :], skip_special_tokens=True)
    log_probs = [text.log_probs]
    return {
        "min_k": float(min_k(log_probs)[0]),
        "min_k_plus_plus": float(min_k_plus_plus(log_probs, [text.expected], [text.variance])[0]),
        "zlib": float(zlib_ratio(log_probs, [answer])[0]),
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
    add_time(subject, "generation", began)
    return records


def add_time(subject: Subject, name: str, began: float) -> None:
    """To the seconds of a measure, those since `began`."""
    subject.seconds[name] = subject.seconds.get(name, 0.0) + time.perf_counter() - began


@torch.no_grad()
def generate(
    subject: Subject, prompts: Sequence[Example], generation: Generation, **sampling: Any
) -> list[tuple[str, int]]:
    """(text, number of tokens) of the model's answer to each prompt, batched, with a key-value cache.

    Greedy, or as `sampling` (do_sample, temperature, num_return_sequences; then as many answers per prompt) says, and
    nothing else: what a model asks for besides (a penalty on repetitions, beams) would hide what it knows. An answer
    ends where the model takes no more tokens; such prompts are answered one by one, so that none ends another's.
    """
    tokenizer, model = subject.tokenizer, base_of(subject.model)
    most = takes(model.config)
    room = most - max(map(len, prompts)) if most else generation.new_tokens
    new_tokens = max(1, min(generation.new_tokens, room))
    if new_tokens < generation.new_tokens and len(prompts) > 1:
        return [said for prompt in prompts for said in generate(subject, [prompt], generation, **sampling)]
    batch = collate(prompts, side="left").to(model.device)
    own = model.generation_config
    model.generation_config = GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id)
    try:
        generated = subject.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=new_tokens,
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
            **({"do_sample": False} | sampling),
        )
    finally:
        model.generation_config = own
    found = []
    for ids in generated[:, batch.input_ids.shape[1] :].tolist():
        said = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        text = str(tokenizer.decode(said, skip_special_tokens=True))
        cut = min((at for stop in generation.stop if (at := text.find(stop)) >= 0), default=len(text))
        found.append((text[:cut].strip(), len(said)))
    return found
