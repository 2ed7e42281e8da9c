"""The last decoder layer where answers are predicted only: of other positions, the head sees keys and values alone.

So its query and output projections and its MLP need not be computed there, nor their gradients, which are zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .layers import Function, computing, decoder_layers
from .tried import close, tried

# Of a base model that was tried: the name of its last decoder layer, and the names in it of the free linear layers.
_FREE: WeakKeyDictionary[nn.Module, tuple[str, list[str]]] = WeakKeyDictionary()
TOKENS, FIRST = 8, 5  # of the rows that are tried, and where their answer begins
SAME = 1e-4  # of the largest logit, or 8 roundings
# At 256 features, taking rows out and putting them back takes a twelfth of the layer's time, as much as is saved at a
# share of about .85. Running text, which is all answer, is above that.
WORTH = 0.8


@torch.no_grad()
def find_free_layers(model: PreTrainedModel) -> None:
    """Try, on a base model without an adapter, which linear layers of its last decoder layer are free.

    One pass over a row as it is and two spoilt ones for each layer: its outputs are NaN before the answer in the first,
    of the other sign in the answer in the second. It is free if the first gives the answer's logits as they were (small
    weights make NaN no smaller) and the second does not (what takes no part in so short a text may do so in others).
    Where NaN gets through a mask, and in a model that cannot be tried, layers are only not free.
    """
    layers = decoder_layers(model)
    if not layers:
        return
    linear = {name: m for name, m in layers[-1].named_modules() if isinstance(m, nn.Linear | Conv1D)}
    ids = torch.arange(TOKENS, device=model.device) % model.config.get_text_config().vocab_size
    ids = ids.expand(1 + 2 * len(linear), -1)
    with ExitStack() as stack:
        for i, module in enumerate(linear.values()):
            stack.enter_context(computing([module], partial(_spoilt, 1 + 2 * i, ids.shape)))
        logits = tried(lambda: model(input_ids=ids, use_cache=False).logits[:, FIRST:].float())
    if logits is None:
        return
    kept = close(logits[1:], logits[0], SAME, 8, model.dtype).all(-1).view(-1, 2, TOKENS - FIRST)
    free = kept[:, 0].all(-1) & ~kept[:, 1].any(-1)
    last = next(name for name, module in model.named_modules() if module is layers[-1])
    _FREE[model] = last, [name for name, found in zip(linear, free.tolist(), strict=True) if found]


def _spoilt(row: int, shape: torch.Size, forward: Function) -> Function:
    def spoilt(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = forward(x, *args, **kwargs)
        if found[..., 0].numel() != shape.numel():  # given some of the tokens only, as an expert is
            return found
        rows = found.reshape(*shape, -1).clone()
        rows[row, :FIRST] = torch.nan
        rows[row + 1, FIRST:] *= -1
        return rows.view(found.shape)

    return spoilt


@contextmanager
def at_answers(model: PreTrainedModel, mask: Tensor) -> Iterator[None]:
    """Within the context a base model's free layers compute the rows of `mask` (examples, tokens) only.

    `model` may hold an adapter. Other rows of their outputs are finite and mean nothing.
    """
    last, names = _FREE.get(model, ("", []))
    layer = model.get_submodule(last)
    # A checkpointed layer is computed again outside of the context, and would then be another.
    if not names or "forward" in vars(layer):
        yield
        return
    rows = mask.flatten().nonzero()[:, 0]
    # Where each token's output is among those of `rows`. The others get the first, not zeros: a norm of zeros need not
    # have a finite gradient. They add nothing to the first's gradient, as theirs is zero.
    place = (mask.flatten().cumsum(0) - 1).mul_(mask.flatten())
    some = 0 < len(rows) <= WORTH * mask.numel()
    with computing([layer.get_submodule(name) for name in names if some], partial(_on_rows, rows, place)):
        yield


def _on_rows(rows: Tensor, place: Tensor, forward: Function) -> Function:
    def some(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != len(place):
            return forward(x, *args, **kwargs)
        # index_select, forward and backward, takes a quarter of the time of x[rows] and index_copy.
        found = forward(flat.index_select(0, rows), *args, **kwargs)
        return found.index_select(0, place).view(*x.shape[:-1], -1)

    return some
