"""The three shapes that data takes on its way to the model: rows of text, token examples, padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch

IGNORED = -100  # the label of a token that carries no loss, as in transformers
PACKED = 512  # tokens in a row of several examples; of a 7B model's step, attention within them takes a fiftieth


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
    """One token sequence; the loss is taken on `input_ids[answer_start:]`, end of text included.

    `fragment`: the answer is a piece of text, which goes on wherever it was taken from; its end of text is ours.
    """

    input_ids: tuple[int, ...]
    answer_start: int
    place: str = ""
    group: str | None = None
    fragment: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def first(self) -> int:
        """The place of the first answer token that can be predicted: that of a sequence never can."""
        return max(self.answer_start, 1)

    @property
    def answer_length(self) -> int:
        """Number of answer tokens that can be predicted."""
        return len(self.input_ids) - self.first


@dataclass(frozen=True)
class Batch:
    """`count` examples, padded: every tensor (rows, tokens) of dtype int64. Padding has attention 0 and label -100.

    `example`: which one a position belongs to. From `collate` every example is a row of its own; in rows from `pack`
    one follows another, in order, and `position_ids` begin again at 0.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    example: torch.Tensor
    count: int

    def to(self, device: torch.device | str) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "count"}
        return replace(self, **{name: t.to(device) for name, t in tensors.items()})

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model's forward takes; the labels stay outside, the loss is ours.

        Padding on the right is behind every real token, so a causal model sees none of it, and its default positions
        are the right ones. Attention that is told of no mask is faster. For packed rows transformers makes the mask
        from positions that begin again.
        """
        if self.count != len(self.input_ids):
            return {"input_ids": self.input_ids, "position_ids": self.position_ids}
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
    starts = [0 if side == "right" else width - len(e) for e in examples]
    return _placed(examples, [(i, start) for i, start in enumerate(starts)], (len(examples), width))


def pack(examples: Sequence[Example], limit: int = PACKED) -> Batch:
    """Several examples in a row, one after another, in rows of PACKED or `limit` tokens at most (or a single example).

    In as few rows as that takes, and these as short as that allows, in eights, as attention kernels want masks. What
    `collate` gives where that is no larger, so that `count` is the number of rows only there.
    """
    lengths = [len(e) for e in examples]
    widest = max(*lengths, min(PACKED, limit) // 8 * 8)
    rows = _in_rows(lengths, widest)[-1][0] + 1
    least = max(*lengths, -(-sum(lengths) // rows))  # fewer tokens a row could not hold them all
    widths = [*range(-(-least // 8) * 8, widest, 8), widest]
    width, places = next((w, found) for w in widths if (found := _in_rows(lengths, w))[-1][0] < rows)
    if rows * width >= len(examples) * max(lengths):
        return collate(examples)
    return _placed(examples, places, (rows, width))


def _in_rows(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """(row, start) of each example, one after another, a new row where one does not fit into the rest of the last."""
    found, row, end = [], 0, 0
    for length in lengths:
        if end + length > width:
            row, end = row + 1, 0
        found.append((row, end))
        end += length
    return found


def _placed(examples: Sequence[Example], places: Sequence[tuple[int, int]], shape: tuple[int, int]) -> Batch:
    """The batch with each example at its (row, start)."""
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    positions, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED, dtype=torch.int64)
    owner = torch.zeros(shape, dtype=torch.int64)
    for i, (example, (row, start)) in enumerate(zip(examples, places, strict=True)):
        stop, first = start + len(example), start + example.first
        ids[row, start:stop] = torch.tensor(example.input_ids, dtype=torch.int64)
        mask[row, start:stop] = 1
        positions[row, start:stop] = torch.arange(len(example))
        labels[row, first:stop] = ids[row, first:stop]
        owner[row, start:stop] = i
    return Batch(ids, mask, positions, labels, owner, len(examples))


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
