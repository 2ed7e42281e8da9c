"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def result(folder: Path, summary: Mapping[str, Any]) -> None:
    """Before and after, where the time went, peak memory, and the verdict as the last line."""
    console = Console(highlight=False)
    scores = Table(title="probability of the answers (95 % interval)", title_justify="left")
    for name in ("set", "examples", "before", "after"):
        scores.add_column(name, justify="left" if name == "set" else "right")
    for name in ("forget", "retain"):
        before, after = summary["before"][name], summary["after"][name]
        scores.add_row(name, str(after["n"]), _interval(before), _interval(after))
    console.print(scores)
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary["seconds"].items())
    memory = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in summary["peak_memory_bytes"].items())
    console.print(f"time: {times}", f"peak memory: {memory}", sep="\n", markup=False, soft_wrap=True)
    console.print(
        f"adapter: {folder}/adapter (rank {summary['export']['rank']}), checked on the untouched base: "
        f"largest logit difference {summary['export']['max_logit_difference']:.1e}",
        summary["verdict"]["text"],
        sep="\n",
        markup=False,
        soft_wrap=True,
    )


def _interval(score: Mapping[str, Any]) -> str:
    """value [low, high]"""
    return f"{score['value']:.3f}" + ("" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]")
