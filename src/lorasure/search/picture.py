"""What a search shows: every trial as a point of forgetting against utility, and the table of the chosen ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import artifacts
from ..errors import escaped
from ..report.style import INK, MARKS, RUNS, Chart, legend, new_figure, save, styled, texts
from .choose import COMPLETE, known

NAME = "forgetting_utility"
KNOWN = ("extraction_strength", "forget_probability")


def write_picture(folder: Path, lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
    """forgetting_utility.svg and .png."""
    chart = picture(lines, result)
    for kind in ("svg", "png"):
        artifacts.write_bytes(folder / f"{NAME}.{kind}", save(chart, kind))


def picture(lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Chart:
    """Every complete trial, a mark per method, the chosen ones larger; the floor as a line. Best is upper left."""
    points = [line for line in lines if line["state"] == COMPLETE]
    marks = list(MARKS.values())  # as many colours as not to repeat a pair before long
    with styled():
        figure, axes = new_figure(3.4)
        for i, (name, row) in enumerate(result["methods"].items()):
            own = [line for line in points if line["method"] == name]
            style = {"color": INK[RUNS[i % len(RUNS)]], "marker": marks[i % len(marks)], "linestyle": ""}
            axes.plot(*_places(own, result), **style, markersize=4, alpha=0.6, label=escaped(name))
            if row["chosen"]:
                axes.plot(*_places([row["chosen"]], result), **style, markersize=8, markeredgecolor=INK["ink"])
        axes.axhline(result["utility_floor"], color=INK["soft"], linestyle=(0, (4, 3)), linewidth=1)
        axes.set(xlabel="still known of the forget set (less is better)", ylabel="share of the original's utility")
        legend(axes, ncols=3)
    said = f"{len(points)} trials that ran to their end, the chosen one of each method larger; "
    said += f"{len(lines) - len(points)} were stopped. Dashed: the least share of utility."
    rows = tuple(texts(p["method"], p["trial"], *(v[0] for v in _places([p], result))) for p in points)
    columns = ("method", "trial", "still known", "utility")
    return Chart(NAME, "Forgetting against utility", said, figure, columns, rows)


def _places(lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    scores = [line["scores"] for line in lines]
    return [known(s, result["level"]) for s in scores], [s["share"] for s in scores]


def show(result: Mapping[str, Any], folder: Path, as_json: bool = False) -> None:
    """The chosen trial of each method on standard output, as a table or as one JSON object."""
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    heads = ("trials", "extraction\nstrength", "forget\nprobability", "utility,\nshare", "log10 forget\nquality")
    table = Table("method", Column("chosen", overflow="fold"), *(Column(head, justify="right") for head in heads))
    table.title, table.title_justify = Text(f"the best of each method: {escaped(str(folder))}/best"), "left"
    for name, row in result["methods"].items():
        count = f"{row['trials']}" + (f" ({row['stopped']} stopped)" if row["stopped"] else "")
        table.add_row(name, *_cells(row, result["utility_floor"], count))
    original, level = result["original"], result["level"]
    values = [f"{original[key]['value']:.4f}" for key in KNOWN]
    table.add_section()
    table.add_row("original", "", "", *values, "100.0%", "")
    if "forget_probability" in level:
        table.add_row("wrong answers", "", "", *(f"{level[key]:.4f}" for key in KNOWN), "", "")
    Console(highlight=False, markup=False, emoji=False).print(table)


def _cells(row: Mapping[str, Any], floor: float, count: str) -> list[str]:
    best, quality = row["chosen"], row["forget_quality"]
    if not best:
        return [f"none keeps {floor:.0%} of the utility", count, "", "", "", ""]
    params = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in best["params"].items()}
    scores = best["scores"]
    known = quality and quality["value"] is not None
    return [
        escaped(" ".join(f"{key}={value}" for key, value in params.items())),
        count,
        *(f"{scores[key]:.4f}" for key in KNOWN),
        f"{scores['share']:.1%}",
        f"{quality['value']:.2f}" if known else "-",
    ]
