"""Model -> records for the scores that compare answers: the true one, a paraphrase, and wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..config import ModelSettings
from ..data.examples import Row, collate
from ..data.load import encode_rows
from ..errors import DataError
from ..forward import Progress, answer_records, base_of


@dataclass(frozen=True)
class ChoiceRecords:
    """Mean NLL per answer token (nats) of the true, the paraphrased and the wrong answers, in row order.

    `correct`: per token of the true answer, whether it is the argmax. `paraphrase` equals `true` where the rows carry
    no paraphrase (TOFU's real authors and world facts).
    """

    true: list[float]
    paraphrase: list[float]
    wrong: list[list[float]]
    correct: list[tuple[bool, ...]]


def choice_records(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: ModelSettings,
    *,
    token_budget: int,
    progress: Progress | None = None,
) -> ChoiceRecords:
    """Records of rows that carry TOFU's columns `perturbed_answer` (a list) and, optionally, `paraphrased_answer`."""
    variants: list[Row] = []
    sizes = []
    for row in rows:
        wrong = row.extra.get("perturbed_answer")
        if not isinstance(wrong, list) or not wrong:
            raise DataError(f"{row.place}: no list of wrong answers in column 'perturbed_answer'.")
        paraphrase = str(row.extra.get("paraphrased_answer", row.answer))
        answers = [row.answer, paraphrase, *map(str, wrong)]
        variants += [replace(row, answer=answer) for answer in answers]
        sizes.append(len(answers))
    encoded = encode_rows(variants, settings, tokenizer)
    found = iter(answer_records(model, encoded.examples, token_budget, progress))
    groups = [[next(found) for _ in range(size)] for size in sizes]
    return ChoiceRecords(
        [group[0].mean_nll for group in groups],
        [group[1].mean_nll for group in groups],
        [[record.mean_nll for record in group[2:]] for group in groups],
        [group[0].correct for group in groups],
    )


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: ModelSettings,
    max_new_tokens: int = 64,
) -> list[str]:
    """The model's own answers to the rows' prompts: greedy, cut at end of text."""
    encoded = encode_rows(rows, settings, tokenizer)
    prompts = [replace(e, input_ids=e.input_ids[: e.answer_start]) for e in encoded.examples]
    batch = collate(prompts, side="left").to(base_of(model).device)
    generated = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    new = generated[:, batch.input_ids.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
