"""Several processes, as `torchrun` or `accelerate launch` start them: each does a share of the passes, sums travel.

Nothing is averaged over processes, so their number changes the order of summation only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UsageError

# Seconds. DTensor's caches keep gloo's threads beyond the group; one that is still letting go of the last gathered
# weights when the interpreter ends aborts the process, and the launcher then ends the others.
LETTING_GO = 0.2


@contextmanager
def joined() -> Iterator[None]:
    """Within the block this process belongs to the group that the launcher has started, if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UsageError("DeepSpeed is not supported; examples/distributed/fsdp2.yaml shares out the base's weights.")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = (
        "false"  # else transformers gives the weights to the first process only
    )
    # Both where there is a GPU: with --device cpu nothing is on it, and `least` is of a number on the host.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        if sharded():
            time.sleep(LETTING_GO)
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0. The first one writes the run folder."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sharded() -> bool:
    """Whether the launcher asks that each process keeps a share of the base's weights only (accelerate's FSDP)."""
    return size() > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def shard(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Leave this process its share of the layers' weights; each layer's are gathered while it computes (FSDP2).

    To be called before an adapter is attached: its factors are in every process as a whole, and so are embeddings.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def whole(weight: Any) -> Tensor:
    """A weight that may be shared out; every process must ask for it at the same point."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def share(groups: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """The micro-batches that this process takes. Where weights are shared out, every process takes as many.

    For that the largest are halved, which changes the order of summation only. UsageError if there are too few rows.
    """
    even = list(groups)
    while sharded() and len(even) % size():
        largest = max(range(len(even)), key=lambda i: len(even[i]))
        group = even[largest]
        if len(group) == 1:
            raise UsageError(f"--batch-size: {len(even)} rows cannot be shared out evenly to {size()} processes.")
        even[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return even[rank() :: size()]


def least(number: int) -> int:
    """The smallest of a number over all processes, which must all come here."""
    if size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def agreed(number: float) -> float:
    """The first process's, for a decision that all must take alike: on a GPU, sums differ in their last bits."""
    if size() == 1:
        return number
    found = torch.tensor(number, dtype=torch.float64)
    dist.broadcast(found, 0)
    return float(found)


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, which must all come here with the same shapes."""
    if size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
