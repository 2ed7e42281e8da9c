"""The one way a name given by a user becomes an entry of a registry (a plain dict at its point of use)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from .errors import UsageError

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`, or raise a UsageError that lists the choices and guesses what was meant.

    >>> lookup({"npo": 1, "ihl": 2}, "nop", "forget loss")
    Traceback (most recent call last):
    lorasure.errors.UsageError: Unknown forget loss 'nop'. Did you mean 'npo'? Choose one of: npo, ihl.
    """
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    raise UsageError(f"Unknown {what} '{name}'.{guess} Choose one of: {', '.join(table)}.")
