"""Several processes, as `torchrun` or `accelerate launch` start them: each does a share of the passes, sums travel.

Nothing is averaged over processes, so their number changes the order of summation only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Part = TypeVar("Part")


@contextmanager
def joined() -> Iterator[None]:
    """Within the block this process belongs to the group that the launcher has started, if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0. The first one writes the run folder."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(parts: Sequence[Part]) -> Sequence[Part]:
    """The parts that this process takes."""
    return parts[rank() :: size()]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, which must all come here with the same shapes."""
    if size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
