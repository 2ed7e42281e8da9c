"""Rows of several examples, for models in which one example in a row sees nothing of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from .data.examples import PACKED, Batch, Example, collate, pack
from .forward import base_of
from .tried import close, tried

_PACKS: WeakSet[nn.Module] = WeakSet()  # base models that were tried
SAME = 1e-3  # of the largest logit, or 16 roundings: attention with a mask is another kernel


def batch_of(model: Any, examples: Sequence[Example]) -> Batch:
    """The examples in one batch on the model's device, packed where `find_packing` has found that it can be."""
    base = base_of(model)
    if base not in _PACKS:
        return collate(examples).to(base.device)
    # No row is longer than what the model was made for: some have masks of that size.
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None) or PACKED
    return pack(examples, limit).to(base.device)


def find_packing(model: PreTrainedModel) -> None:
    """Pack from now on, where this base model can and is on a GPU.

    On a CPU padding costs no more than the wider attention of packed rows: .95 to 1.1 times the time of an epoch.
    """
    if model.device.type != "cpu" and can_pack(model):
        _PACKS.add(model)


@torch.no_grad()
def can_pack(model: PreTrainedModel) -> bool:
    """By a try: are an example's logits the same behind any other in its row, and about those that it has alone?

    The former to the last bit: what leaks from the neighbour (convolutions, recurrent states, positions that are read
    off the first row only) can be less than another kernel rounds.
    """
    ids = torch.arange(16, device=model.device) % model.config.get_text_config().vocab_size
    a, b, c, begin = ids[:4], ids[4:8], ids[8:12], torch.arange(4, device=model.device)
    rows = torch.stack([torch.cat(row) for row in ((a, b), (c, b), (c[:3], b, a[:1]))])
    places = torch.stack([torch.cat(row) for row in ((begin, begin), (begin, begin), (begin[:3], begin, begin[:1]))])

    def attempt() -> tuple[torch.Tensor, torch.Tensor]:
        packed = model(input_ids=rows, position_ids=places, use_cache=False).logits.float()
        return packed, model(input_ids=b[None], use_cache=False).logits.float()

    if (outputs := tried(attempt)) is None:
        return False
    packed, alone = outputs
    found = torch.stack([packed[0, 4:], packed[1, 4:], packed[2, 3:7]])
    return torch.equal(found[0], found[1]) and bool(close(found, alone, SAME, 16, model.dtype).all())
