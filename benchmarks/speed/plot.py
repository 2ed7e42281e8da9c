"""The results as one picture: times faster than the others, and how time and memory grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

AXES = ("rows", "length", "width", "rank", "vocabulary")
ROWS = (("seconds_per_token", "µs per token", 1e6), ("seconds", "s", 1.0), ("peak_bytes", "MB", 1e-6))
COLOURS = {"published": "#b2452f", "typical": "#d99a3d", "bare": "#7a8b99"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write a PNG; parts that were not measured stay out."""
    points = results.get("growth", [])
    figure = plt.figure(figsize=(13, 9.5 if points else 3), layout="constrained")
    grid = figure.add_gridspec(1 + len(ROWS) if points else 1, len(AXES))
    _ratios(figure.add_subplot(grid[0, :]), results["parts"])
    for column, axis in enumerate(AXES if points else ()):
        for row, (what, unit, factor) in enumerate(ROWS):
            panel = figure.add_subplot(grid[row + 1, column])
            _growth(panel, points, axis, what, factor)
            panel.set_ylabel(unit if column == 0 else "")
            panel.set_xlabel(axis if row == len(ROWS) - 1 else "")
            if column == 0:
                panel.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _ratios(panel, parts: dict[str, Any]) -> None:
    width = 0.27
    for i, (method, colour) in enumerate(COLOURS.items()):
        for x, part in enumerate(parts.values()):
            if found := part["ratios"].get(method):
                span = [[found["median"] - found["low"]], [found["high"] - found["median"]]]
                panel.bar(x + (i - 1) * width, found["median"], width, yerr=span, color=colour, capsize=2)
        panel.bar(0, 0, color=colour, label=method)
    panel.set_xticks(range(len(parts)), [name.replace("_", " ") for name in parts])
    panel.set_yscale("log")
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_ylabel("time / ours, per row")
    panel.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))


def _growth(panel, points: list[dict[str, Any]], axis: str, what: str, factor: float) -> None:
    """Those points that differ from the first in this axis alone (longer rows are fewer)."""
    free = {axis, "rows"} if axis == "length" else {axis}
    for part, colour in (("importance", "#2f6db2"), ("init", "#8a5fb0"), ("ihl", "#3d9a5f")):
        if what not in points[0][part]:
            continue
        chosen = [p for p in points if all(p[k] == points[0][k] for k in AXES if k not in free)]
        if axis == "length":
            chosen = [p for p in chosen if p["rows"] * p["length"] <= points[0]["rows"] * points[0]["length"]]
        chosen.sort(key=lambda p: p[axis])
        panel.plot([p[axis] for p in chosen], [p[part][what] * factor for p in chosen], "o-", color=colour, label=part)
    panel.set_xscale("log", base=2 if axis != "rows" else 10)
    panel.set_ylim(bottom=0)
