"""The side-by-side table of a recipe: published figures and ours."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rich.console import Console
from rich.table import Column, Table

from ..errors import escaped
from .recipe import Gain, Recipe
from .reproduce import Line

NAMES = {"forget_quality": "log10 quality", "model_utility": "utility", "map_gigabytes": "map, GB"}
OURS = "ours"


def columns(recipe: Recipe, lines: Sequence[Line]) -> list[tuple[str, str]]:
    """(score, whose) of every column: ours, and before that the models of which a figure is published."""
    found = []
    for score in recipe.scores:
        sources = {name for line in lines for name, figures in line.published.items() if score in figures}
        found += [(score, name) for name in sorted(sources)] + [(score, OURS)]
    return found


def gains(gain: Gain, lines: Sequence[Line], recipe: Recipe) -> dict[str, float | None]:
    """Name without the last axis -> our gain, see `Gain`; None unless every figure that it takes is there."""
    places = {cell.name: list(cell.place.values()) for cell in recipe.cells}
    axis = list(recipe.cells[0].place).index(gain.axis)
    count = len({place[-1] for place in places.values()})
    groups: dict[tuple[str, ...], list[float]] = {}
    for line in lines:
        if line.name in places:
            values = groups.setdefault(tuple(places[line.name][:-1]), [])
            values += [v for v in [line.ours.get(gain.score)] if v is not None]
    found = {}
    for names, values in groups.items():
        other = groups.get((*names[:axis], gain.against, *names[axis + 1 :]), [])
        if names[axis] != gain.against:
            whole = len(values) == len(other) == count
            found["/".join(names)] = fmean(values) - fmean(other) if whole else None
    return found


def show(recipe: Recipe, lines: Sequence[Line]) -> None:
    """Print the table, what is published as gains, what failed, and the recipe's notes."""
    console = Console(highlight=False, markup=False, emoji=False)
    wanted = columns(recipe, lines)
    heads = [f"{NAMES.get(score, score)}\n{whose}" for score, whose in wanted]
    table = Table(Column("cell", no_wrap=True), *(Column(head, justify="right", no_wrap=True) for head in heads))
    paper = f" ({recipe.paper})" if recipe.paper else ""
    table.title, table.title_justify = f"{recipe.title}; {recipe.models}{paper}", "left"
    for line in lines:
        own = line.published | {OURS: line.ours}
        table.add_row(escaped(line.name), *(_number(own.get(whose, {}).get(score)) for score, whose in wanted))
    console.print(table)
    if recipe.gain:
        _show_gains(console, recipe.gain, gains(recipe.gain, lines, recipe))
    failed = [f"failed: {line.name}: {line.failed}" for line in lines if line.failed]
    console.print(*failed, *recipe.notes, sep="\n", markup=False, soft_wrap=True)


def _show_gains(console: Console, gain: Gain, ours: dict[str, float | None]) -> None:
    table = Table("cell", *(Column(whose, justify="right") for whose in (*gain.published, OURS)))
    table.title = f"gain in {NAMES.get(gain.score, gain.score)} over {gain.against}, mean over the last axis"
    table.title_justify = "left"
    for name, value in ours.items():
        table.add_row(name, *(_number(part.get(name)) for part in gain.published.values()), _number(value))
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"
