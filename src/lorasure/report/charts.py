"""The charts: each function takes plain data and returns a Chart, which serves the page and a paper alike."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import escaped
from ..evaluate.metrics import Score
from .read import Point
from .style import INK, MARKS, Chart, colours_of, legend, new_figure, number, styled, texts
from .tables import NAMES, Table
from .verdict import KNOWLEDGE, place

QUANTILES = (0, 5, 10, 25, 50, 75, 90, 95, 100)
SHOWN_STEPS = 25  # lines of the table beside the training curves
SUBJECTS = {"unlearned": "after", "retrained": "retrained"}  # of attacks -> colour
MOST_FORMS = 3  # an attack with more points is a curve
SMALLEST_RATIO = 1e-6  # the axis of truth ratios begins here at the least
Cells = tuple[Score | None, ...]


def intervals(table: Table) -> Chart | None:
    """Every score of a table that lies in [0, 1] with its interval, a mark per model."""
    groups: dict[str, list[tuple[str, Cells]]] = {}
    for row in table.rows:
        values = [s.value for s in row.cells if s is not None and s.value is not None]
        if values and all(0 <= value <= 1 for value in values):
            groups.setdefault(row.set, []).append((row.name, row.cells))
    if not groups:
        return None
    figure = _forest(groups, colours_of(table.columns))
    said = "Scores between 0 and 1 with their 95 % intervals. The figures are in the table above."
    return Chart("scores", "Scores at a glance", said, figure, (), ())


def _forest(groups: Mapping[str, Sequence[tuple[str, Cells]]], colours: Mapping[str, str]) -> Any:
    """Groups of rows on a scale from 0 to 1; each row holds a mark and an interval per series, side by side."""
    lines: list[tuple[str, Cells | None]] = []
    for name, rows in groups.items():
        lines += [(name, None)] if name else []
        lines += rows
    step = min(0.26, 0.7 / len(colours))
    with styled():
        figure, axes = new_figure(0.6 + 0.24 * len(lines))
        for i, (name, colour) in enumerate(colours.items()):
            offset = (i - (len(colours) - 1) / 2) * step
            axes.plot([], [], MARKS[colour], color=INK[colour], markersize=4.2, label=escaped(name))
            for y, (_, cells) in enumerate(lines):
                if cells and (score := cells[i]) is not None and score.value is not None:
                    if score.low is not None:
                        axes.plot([score.low, score.high], [y + offset] * 2, color=INK[colour], linewidth=1.1)
                    axes.plot([score.value], [y + offset], MARKS[colour], color=INK[colour], markersize=4.2)
        axes.set(ylim=(len(lines) - 0.4, -0.6), xlim=(-0.02, 1.02))
        axes.set_yticks(range(len(lines)), [escaped(label) for label, _ in lines])
        for label, (_, cells) in zip(axes.get_yticklabels(), lines, strict=True):
            label.set(fontweight="normal" if cells else "bold", color=INK["soft" if cells else "ink"])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.2)
    return figure


def truth_ratio_curves(ratios: Mapping[str, np.ndarray], reference: str = "retrained") -> Chart:
    """Empirical distributions of R on the forget set; the KS distance to `reference` is marked for the last run."""
    from matplotlib.ticker import LogLocator, NullFormatter

    colours = colours_of(list(ratios))
    with styled():
        figure, axes = new_figure(3.1)
        low = max(min(float(r.min()) for r in ratios.values()), SMALLEST_RATIO)
        high = max(max(float(r.max()) for r in ratios.values()), low * 10)
        for name, values in ratios.items():
            ordered = np.sort(values)
            x = np.concatenate([[low / 2], np.clip(ordered, low / 2, None), [high * 1.2]])
            y = np.concatenate([[0], np.arange(1, len(ordered) + 1) / len(ordered), [1]])
            axes.step(x, y, where="post", color=INK[colours[name]], label=escaped(name))
        sizes = ", ".join(str(size) for size in dict.fromkeys(map(len, ratios.values())))
        said = f"Share of the rows to forget (n = {sizes}) whose truth ratio is at most x."
        own = next((n for n in ratios if n not in ("before", reference)), None)
        if reference in ratios and own:
            at, bottom, top = _ks_distance(ratios[own], ratios[reference])
            axes.plot([max(at, low)] * 2, [bottom, top], color=INK["ink"], linewidth=2.4, solid_capstyle="butt")
            distance = f"D = {top - bottom:.3f}"
            axes.text(0.98, 0.06, distance, transform=axes.transAxes, ha="right")
            said += f" The largest distance between {escaped(own)} and {reference} is {distance}, at R = {at:.3g}."
        axes.set(xscale="log", xlim=(low / 2, high * 1.2), ylim=(0, 1.02))
        axes.set(xlabel="truth ratio R", ylabel="share of rows")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,), numticks=8))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        legend(axes, ncols=3)
    rows = tuple(texts(f"{q} %", *(float(np.percentile(v, q)) for v in ratios.values())) for q in QUANTILES)
    return Chart("truth-ratio", "Truth ratios of the rows to forget", said, figure, ("quantile", *ratios), rows)


def _ks_distance(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Where the two distribution functions differ most, and the lower and the higher of them there."""
    places = np.union1d(one, other)
    a, b = (np.searchsorted(np.sort(v), places, side="right") / len(v) for v in (one, other))
    worst = int(np.argmax(np.abs(a - b)))
    return float(places[worst]), *sorted((float(a[worst]), float(b[worst])))  # type: ignore[return-value]


def tradeoff(points: Mapping[str, tuple[Score, Score]], names: tuple[str, str]) -> Chart:
    """What is left of the forget set (x) against the utility (y); the best place is the upper left corner."""
    colours = colours_of(list(points))
    with styled():
        figure, axes = new_figure(3.1)
        for name, pair in points.items():
            colour = INK[colours[name]]
            x, y = (s.value for s in pair)
            for s, (xs, ys) in zip(pair, ((("low", "high"), (y, y)), ((x, x), ("low", "high"))), strict=True):
                if s.low is not None:
                    line = [[getattr(s, v) if isinstance(v, str) else v for v in vs] for vs in (xs, ys)]
                    axes.plot(*line, color=colour, linewidth=1, alpha=0.7)
            axes.plot([x], [y], MARKS[colours[name]], color=colour, markersize=6, label=escaped(name))
        axes.set(xlabel=f"{names[0]} (less is better)", ylabel=f"{names[1]} (more is better)")
        legend(axes, ncols=3)
    said = f"{names[0]}, against {names[1][0].lower()}{names[1][1:]}: a mark per model with its 95 % intervals."
    cells = tuple(texts(name, *(v for s in pair for v in (s.value, s.low, s.high))) for name, pair in points.items())
    columns = ("model", names[0], "low", "high", names[1], "low", "high")
    return Chart("tradeoff", "Forgetting against utility", said, figure, columns, cells)


def training(steps: Sequence[Mapping[str, Any]]) -> Chart:
    """Every loss term, the gradient's norm and the learning rate over the steps."""
    names = [name for name in steps[0] if name not in ("step", "tokens", "seconds")]
    names = sorted(names, key=lambda name: name in ("lr", "grad_norm"))
    titles = {"lr": "learning rate", "grad_norm": "gradient norm", "penalty": "penalty"}
    titles |= {"forget_weight": "weight of the forget loss"}
    height = math.ceil(len(names) / 2)
    with styled():
        figure, axes = new_figure(0.3 + 1.45 * height, height, 2, squeeze=False, sharex=True)
        x = [step["step"] for step in steps]
        for panel, name in zip(axes.flat, names, strict=False):
            colour = {"forget": "after", "retain": "retrained"}.get(name, "soft")
            panel.plot(x, [step.get(name, math.nan) for step in steps], color=INK[colour], linewidth=1.3)
            panel.set_title(titles.get(name, f"{name} loss"))
        for panel in axes.flat[len(names) :]:
            panel.set_visible(False)
        figure.supxlabel("step", color=INK["soft"], fontsize=9)
    every = math.ceil(len(steps) / SHOWN_STEPS)
    chosen = [*steps[:-1:every], steps[-1]]
    rows = tuple(texts(step["step"], *(step.get(name) for name in names)) for step in chosen)
    said = f"{len(steps)} steps. " + ", ".join(
        f"{titles.get(n, f'{n} loss')} from {number(steps[0].get(n))} to {number(steps[-1].get(n))}" for n in names
    )
    columns = ("step", *(titles.get(n, f"{n} loss") for n in names))
    return Chart("training", "Training", f"{said}.", figure, columns, rows)


def importance(means: Mapping[str, float]) -> Chart:
    """Mean importance by layer (down) and module (across): the darker, the more it carries of the forget set alone."""
    grid = _grid(means)
    layers = sorted({layer for layer, _ in grid}, key=lambda layer: int(layer) if layer else math.inf)
    modules = list(dict.fromkeys(module for _, module in grid))
    labels = [module.rpartition(".")[2] for module in modules]
    labels = modules if len(set(labels)) < len(labels) else labels
    logs = {key: math.log10(value) for key, value in grid.items() if value > 0}
    low, high = (min(logs.values()), max(logs.values())) if logs else (0.0, 0.0)
    with styled():
        from matplotlib.collections import PolyCollection
        from matplotlib.colors import to_rgba

        figure, axes = new_figure(1.1 + 0.2 * max(len(layers), 4))
        squares, shades = [], []
        for (layer, module), log in logs.items():
            x, y = modules.index(module), layers.index(layer)
            squares.append([(x - 0.47, y - 0.46), (x + 0.47, y - 0.46), (x + 0.47, y + 0.46), (x - 0.47, y + 0.46)])
            share = (log - low) / (high - low) if high > low else 1
            shades.append(to_rgba(INK["after"], round(0.08 + 0.92 * share, 2)))
        axes.add_collection(PolyCollection(squares, facecolors=shades, edgecolors="none"))
        axes.set(xlim=(-0.5, len(modules) - 0.5), ylim=(len(layers) - 0.5, -0.5), ylabel="layer")
        axes.set_xticks(range(len(modules)), labels, rotation=35, ha="right", rotation_mode="anchor")
        every = math.ceil(len(layers) / 24)
        axes.set_yticks(range(0, len(layers), every), layers[::every])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        scale = f"pale {10**low:.2g} to full {10**high:.2g}, logarithmic"
        axes.set_title(scale, color=INK["soft"], fontweight="normal")
    top = sorted(means, key=lambda name: -means[name])[:3]
    said = "Mean entry of the importance map, score(forget) / score(retain), per layer and module. Highest: "
    said += ", ".join(f"{escaped(name)} ({number(means[name])})" for name in top) + "."
    rows = tuple(texts(layer, *(grid.get((layer, module)) for module in modules)) for layer in layers)
    return Chart("importance", "Where the forget set lives", said, figure, ("layer", *labels), rows)


def _grid(means: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """(layer, module) -> value: the first number in a site's name is its layer."""
    found = {}
    for site, value in means.items():
        number = re.search(r"(?:^|\.)(\d+)(?=\.)", site)
        layer, module = (number[1], site[number.end() + 1 :]) if number else ("", site)
        found[layer, escaped(module)] = value
    return found


def attack_forms(points: Sequence[Point], before: Mapping[str, Score]) -> list[Chart]:
    """What each form of each attack gets out of the unlearned and of the retrained model; attacks that are curves not.

    One chart for the most trustworthy score, one more for the attacks that only have another one.
    """
    drawn, left = [], [p for p in points if not is_curve(points, p.attack)]
    for metric in KNOWLEDGE:
        chosen = [p for p in left if _value(p, metric) is not None]
        if not chosen:
            continue
        subjects = [s for s in SUBJECTS if any(p.subject == s for p in chosen)]
        found = {(place(p), p.subject): p.scores[metric] for p in chosen}
        rows = [(name, tuple(found.get((name, s)) for s in subjects)) for name in dict.fromkeys(n for n, _ in found)]
        colours = {s: SUBJECTS[s] for s in subjects}
        if known := before.get(f"forget_{metric}"):
            nothing = (None,) * len(subjects)
            rows = [("before forgetting", (known, *nothing)), *((name, (None, *cells)) for name, cells in rows)]
            colours = {"before forgetting": "before"} | colours
        figure = _forest({"": rows}, colours)
        columns = ("attack", *colours)
        cells = tuple(texts(name, *(s and s.value for s in scores)) for name, scores in rows)
        said = f"{NAMES[metric]} of the rows to forget under each attack, with 95 % intervals."
        drawn.append(Chart(f"attacks-{metric}", f"Attacks: {NAMES[metric]}", said, figure, columns, cells))
        left = [p for p in left if p.attack not in {q.attack for q in chosen}]
    return drawn


def is_curve(points: Sequence[Point], attack: str) -> bool:
    """Whether an attack was measured along its way, rather than in a few forms."""
    return len({p.point for p in points if p.attack == attack}) > MOST_FORMS


def attack_curve(name: str, points: Sequence[Point], before: Mapping[str, Score]) -> Chart:
    """What an attack brings back along its way, in the unlearned and in the retrained model."""
    metric = next((m for m in KNOWLEDGE if any(_value(p, m) is not None for p in points)), KNOWLEDGE[0])
    with styled():
        figure, axes = new_figure(2.6)
        for subject, colour in SUBJECTS.items():
            chosen = [p for p in points if p.subject == subject and _value(p, metric) is not None]
            for p in chosen:
                if (score := p.scores[metric]).low is not None:
                    axes.plot([p.point] * 2, [score.low, score.high], color=INK[colour], linewidth=1, alpha=0.7)
            style = {"color": INK[colour], "marker": MARKS[colour], "markersize": 4.5, "label": subject}
            if chosen:
                axes.plot([p.point for p in chosen], [_value(p, metric) for p in chosen], **style)
        known = before.get(f"forget_{metric}")
        if known is not None and known.value is not None:
            axes.axhline(
                known.value, color=INK["before"], linestyle=(0, (4, 3)), linewidth=1.2, label="before forgetting"
            )
        axes.set(ylim=(-0.03, 1.05), ylabel=NAMES[metric], xlabel="step")
        legend(axes, ncols=3)
    columns = ("step", "model", *(NAMES[m] for m in KNOWLEDGE))
    rows = tuple(texts(p.point, p.subject, *(_value(p, m) for m in KNOWLEDGE)) for p in points)
    said = f"{NAMES[metric]} of the rows to forget along the way, with 95 % intervals."
    return Chart(f"attack-{name}", f"Attack: {escaped(name)}", said, figure, columns, rows)


def _value(point: Point, metric: str) -> float | None:
    return point.scores[metric].value if metric in point.scores else None
