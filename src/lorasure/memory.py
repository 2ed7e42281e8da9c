"""Out of memory: the same work again in smaller pieces, which changes its result by the order of summation only."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import artifacts, processes
from .data.examples import micro_batches
from .errors import ResourceError, is_out_of_memory
from .progress import Reporter

Result = TypeVar("Result")
Fired = Callable[[dict[str, Any]], None]


def within_memory(
    attempt: Callable[[int], Result], token_budget: int, lengths: Sequence[int], what: str, fired: Fired
) -> tuple[Result, int]:
    """(result of `attempt(token_budget)`, token budget), halved as often as it takes; `fired` hears of each time.

    `attempt` must start from the same state each time, and cut rows of the given lengths by `micro_batches`. Raises
    ResourceError when memory runs out although every row is alone.
    """
    while True:
        try:
            return attempt(token_budget), token_budget
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if processes.size() > 1:  # the others would go on with other shares
                raise ResourceError(
                    f"{what}: out of memory. Several processes need a --tokens-per-batch that fits."
                ) from error
            groups = micro_batches(lengths, token_budget)
            if max(map(len, groups)) == 1:
                raise ResourceError(
                    f"{what}: out of memory with a single row of {max(lengths)} tokens. "
                    "Shorten rows with --max-length, add --gradient-checkpointing true, or take a smaller --dtype."
                ) from error
            token_budget = max(len(group) * lengths[group[0]] for group in groups) // 2
        gc.collect()  # only here is the traceback gone, which held the tensors of the attempt
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        fired({"guard": "out of memory", "where": what, "tokens_per_batch": token_budget})


def free_on(device: torch.device) -> int:
    """Bytes of a GPU's memory that are free, with what torch's allocator keeps of earlier work for later."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def note_guard(reporter: Reporter, account: Path | None, guard: Mapping[str, Any]) -> None:
    """Say that a guard has acted, and add it to the `account` at once, a JSON file with a list of guards."""
    reporter.note(", ".join(f"{key}: {value}" for key, value in guard.items()))
    if account:
        found = artifacts.read_json(account)
        artifacts.write_json(account, found | {"guards": [*found["guards"], guard]})
