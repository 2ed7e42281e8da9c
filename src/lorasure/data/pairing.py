"""Which retain row each forget row meets in an epoch, and which rows a subset holds.

Every order follows from (seed, epoch) alone: batch size, device count and a resumed run change nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import DataError, UsageError
from ..registry import lookup

Groups = Sequence[str | None]
Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Pairing:
    """`function(forget groups, retain groups, epoch, seed)` gives (forget, retain) indices in order of use."""

    title: str
    function: Callable[[Groups, Groups, int, int], Pairs]


def pairs(forget_groups: Groups, retain_groups: Groups, *, epoch: int, seed: int, mode: str) -> Pairs:
    """One (forget index, retain index) for each forget row, in the order of epoch `epoch` (counted from 0).

    The arguments are the `group` of each row or example; only `modular` looks at more than how many there are.
    Raises DataError if either set is empty, UsageError for an unknown mode.
    """
    pairing = lookup(PAIRINGS, mode, "pairing")
    for name, groups in (("forget", forget_groups), ("retain", retain_groups)):
        if not groups:
            raise DataError(f"The {name} set is empty; pairing needs at least one row.")
    return pairing.function(forget_groups, retain_groups, epoch, seed)


def sample(n: int, k: int, seed: int) -> list[int]:
    """`k` indices below `n` in random order; no index comes twice before all have come once."""
    if n < 1:
        raise DataError("Cannot sample from an empty set of rows.")
    if k < 0:
        raise UsageError(f"The number of rows to sample must be at least 0, got {k}.")
    return _stream(n, 0, k, f"{seed}/sample")


def _stream(n: int, start: int, count: int, key: str) -> list[int]:
    """Places `start` to `start + count` of an endless stream: one permutation of range(n) after another.

    Block b is shuffled by its own generator, seeded by (key, b), so a run resumed at any epoch sees the same stream.
    """
    out: list[int] = []
    for block in range(start // n, -(-(start + count) // n)):
        order = list(range(n))
        random.Random(f"{key}/{block}").shuffle(order)
        out += order[max(0, start - block * n) : start + count - block * n]
    return out


def _random(forget: Groups, retain: Groups, epoch: int, seed: int) -> Pairs:
    """A new forget order each epoch; the retain rows are one stream through all epochs, used up before any repeats."""
    n = len(forget)
    forget_order = _stream(n, epoch * n, n, f"{seed}/forget")
    return list(zip(forget_order, _stream(len(retain), epoch * n, n, f"{seed}/retain"), strict=True))


def _cyclic(forget: Groups, retain: Groups, epoch: int, seed: int) -> Pairs:
    """File order: forget row i of epoch e meets retain row (e * forget rows + i) mod retain rows.

    The offset goes on from epoch to epoch, so that all of a larger retain set gets its turn. The seed is unused.
    """
    n = len(forget)
    return [(i, (epoch * n + i) % len(retain)) for i in range(n)]


def _modular(forget: Groups, retain: Groups, epoch: int, seed: int) -> Pairs:
    """MELU: file order, `cyclic` inside each group, so a forget row meets the retain rows of its own group only."""
    members = [_members(groups, name) for groups, name in ((forget, "forget"), (retain, "retain"))]
    partner: dict[int, int] = {}
    for group, rows in members[0].items():
        others = members[1].get(group)
        if others is None:
            raise DataError(f"--pairing modular: no retain row has the group of forget row {rows[0] + 1}.")
        partner |= {i: others[(epoch * len(rows) + j) % len(others)] for j, i in enumerate(rows)}
    return sorted(partner.items())


def _members(groups: Groups, name: str) -> dict[str, list[int]]:
    """Row indices by group, in file order."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        if group is None:
            text = f"--pairing modular needs a group for every row (--group-key), {name} row {index + 1} has none."
            raise UsageError(text)
        members.setdefault(group, []).append(index)
    return members


PAIRINGS = {
    "random": Pairing("a new random retain row for each forget row", _random),
    "cyclic": Pairing("file order, retain rows in turn", _cyclic),
    "modular": Pairing("retain rows of the same group in turn (MELU, arXiv 2509.05316)", _modular),
}
