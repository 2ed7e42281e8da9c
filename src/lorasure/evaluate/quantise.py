"""Weights as a quantised model has them: rounded to few bits and back. Pure functions of one matrix."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UsageError

# Inputs that share a scale, per number of bits; None: all inputs of an output channel. As weight-only formats have it.
GROUPS: dict[int, int | None] = {8: None, 4: 128}
NF4_BLOCK = 64  # weights that share a scale in NF4, the value of its paper


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """W (out, in), rounded to `bits` bits and back, in float32.

    Symmetric: within a group of inputs of one output (GROUPS) the levels are -q..q times the group's largest magnitude
    over q, q = 2^(bits - 1) - 1, so no weight moves by more than that magnitude / 2q and a second time changes nothing.
    The last group of a row may be shorter; a group of zeros stays zero.
    """
    if bits not in GROUPS:
        raise UsageError(f"bits must be one of {', '.join(map(str, GROUPS))}, got {bits}.")
    outputs, inputs = weight.shape
    size = GROUPS[bits] or inputs
    groups = pad(weight.float(), (0, -inputs % size)).view(outputs, -1, size)
    highest = 2 ** (bits - 1) - 1
    step = groups.abs().amax(-1, keepdim=True) / highest
    codes = (groups / torch.where(step > 0, step, 1)).round()
    return (codes * step).view(outputs, -1)[:, :inputs]


def nf4(weight: Tensor) -> Tensor:
    """W (out, in), through bitsandbytes' 4-bit NormalFloat and back (QLoRA, arXiv 2305.14314)."""
    functions = import_module("bitsandbytes.functional")
    codes, state = functions.quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return functions.dequantize_4bit(codes, state)
