"""The three shapes that data takes on its way to the model: rows of text, token examples, padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

IGNORED = -100  # the label of a token that carries no loss, as in transformers


@dataclass(frozen=True)
class Row:
    """One row of a data set, before tokenization.

    `prompt` and `answer` are what the template joins; `kind` says how: `qa` (question and answer, templated),
    `completion` (joined as they are), `chat` (`messages` before the answer, through the chat template) or `text` (no
    prompt; the answer is cut into windows). `source` and `line` (counted from 1) are for messages to the user. The text
    itself is never logged.
    """

    prompt: str
    answer: str
    source: str
    line: int
    kind: str = "qa"
    messages: tuple[dict[str, str], ...] = ()
    group: str | None = None
    extra: dict[str, object] = field(default_factory=dict, compare=False)

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Example:
    """One token sequence; the loss is taken on `input_ids[answer_start:]`, end of text included."""

    input_ids: tuple[int, ...]
    answer_start: int
    place: str = ""
    group: str | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def answer_length(self) -> int:
        """Number of answer tokens that can be predicted (the first token of a sequence never can)."""
        return len(self.input_ids) - max(self.answer_start, 1)


@dataclass(frozen=True)
class Batch:
    """A padded batch, every tensor (examples, tokens) of dtype int64. Padding has attention 0 and label -100."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(t.to(device) for t in (self.input_ids, self.attention_mask, self.position_ids, self.labels)))

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model's forward takes; the labels stay outside, the loss is ours.

        Padding on the right is behind every real token, so a causal model sees none of it, and its default positions
        are the right ones. Attention that is told of no mask is faster.
        """
        if self.attention_mask[:, 0].all():
            return {"input_ids": self.input_ids}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids}


def collate(examples: Sequence[Example], side: str = "right") -> Batch:
    """Pad by length, never by token id, so that a real end-of-text token keeps its loss when pad = eos.

    `position_ids` count real tokens from 0, so a left-padded batch gives the same logits as a right-padded one.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    width = max(len(e) for e in examples)
    shape = (len(examples), width)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    positions, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED, dtype=torch.int64)
    for i, example in enumerate(examples):
        n = len(example)
        start = 0 if side == "right" else width - n
        tokens = torch.tensor(example.input_ids, dtype=torch.int64)
        ids[i, start : start + n] = tokens
        mask[i, start : start + n] = 1
        positions[i, start : start + n] = torch.arange(n)
        first = max(example.answer_start, 1)
        labels[i, start + first : start + n] = tokens[first:]
    return Batch(ids, mask, positions, labels)


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices grouped by length so that each group, padded, holds at most `token_budget` tokens (or a single row).

    Longest first, so that the peak of memory comes in the first batch and not in the last.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
