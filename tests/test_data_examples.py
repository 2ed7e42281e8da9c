"""Batches: padding by length, labels on answers only, micro-batches within their budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasure.data.examples import IGNORED, Example, collate, micro_batches

EOS = 0  # also the padding of a batch, as when pad = eos


@st.composite
def examples(draw):
    ids = draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    return Example((*ids, EOS), draw(st.integers(0, len(ids))))


BATCHES = st.lists(examples(), min_size=1, max_size=5)
SIDES = st.sampled_from(["left", "right"])


@pytest.mark.fault(
    "padding = end of text, rows padded on the left or the right",
    "P10",
    "every answer token has its loss, the end of text too; padding has none",
    "examples.py: no label where the token is that of padding",
)
@given(BATCHES, SIDES)
def test_every_answer_token_has_its_label_once_and_nothing_else_has(batch, side):
    out = collate(batch, side)
    for i, example in enumerate(batch):
        answer = example.input_ids[max(example.answer_start, 1) :]
        kept = out.labels[i] != IGNORED
        assert out.labels[i][kept].tolist() == list(answer)
        assert kept.sum() == example.answer_length == len(answer)
        assert torch.equal(out.labels[i][kept], out.input_ids[i][kept])
        assert not kept[out.attention_mask[i] == 0].any()


@given(BATCHES, SIDES)
def test_tokens_and_positions_survive_padding(batch, side):
    out = collate(batch, side)
    for i, example in enumerate(batch):
        real = out.attention_mask[i] == 1
        assert out.input_ids[i][real].tolist() == list(example.input_ids)
        assert out.position_ids[i][real].tolist() == list(range(len(example)))
        assert real[0 if side == "right" else -1]


@given(BATCHES)
def test_both_sides_have_the_same_labels(batch):
    left, right = (collate(batch, side).labels for side in ("left", "right"))
    for a, b in zip(left, right, strict=True):
        assert a[a != IGNORED].tolist() == b[b != IGNORED].tolist()


def test_by_hand():
    out = collate([Example((5, 6, EOS), 1), Example((7, EOS), 0)])
    assert out.input_ids.tolist() == [[5, 6, EOS], [7, EOS, 0]]
    assert out.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert out.position_ids.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert out.labels.tolist() == [
        [IGNORED, 6, EOS],
        [IGNORED, EOS, IGNORED],
    ]  # eos learnt, padding not, though both are 0
    assert set(out.inputs) == {"input_ids"}  # padding on the right needs no mask
    left = collate([Example((5, 6, EOS), 1), Example((7, EOS), 0)], "left")
    assert set(left.inputs) == {"input_ids", "attention_mask", "position_ids"}
    assert all(t.dtype == torch.int64 for t in (*left.inputs.values(), out.labels))
    assert torch.equal(out.to("cpu").labels, out.labels)


def test_wrong_side():
    with pytest.raises(ValueError, match="side must be 'left' or 'right', got 'top'"):
        collate([Example((1, 2), 1)], "top")


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 60))
def test_micro_batches(lengths, budget):
    groups = micro_batches(lengths, budget)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= budget
    longest = [max(lengths[i] for i in g) for g in groups]
    assert longest == sorted(longest, reverse=True)


def test_micro_batches_by_hand():
    assert micro_batches([2, 9, 3, 3], 6) == [[1], [2, 3], [0]]
