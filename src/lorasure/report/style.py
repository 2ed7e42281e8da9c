"""How charts look, and how a figure becomes SVG for a page: text as text, colours that follow the page's theme."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import escaped

# Name -> (light, dark). Figures are drawn in the light colours; on a page they become var(--name), which has both.
COLOURS = {
    "ink": ("#1b2130", "#e7eaf1"),
    "soft": ("#5a6375", "#a4adbe"),
    "line": ("#d4d9e3", "#39415a"),
    "before": ("#b3591a", "#f0a060"),
    "after": ("#2456c9", "#82abff"),
    "retrained": ("#1f8254", "#5fcb9a"),
    "other1": ("#8939b5", "#cd94ee"),
    "other2": ("#b3265a", "#f582a9"),
    "other3": ("#0d7d8d", "#56c5d3"),
    "other4": ("#6a6a12", "#cccb62"),
}
INK = {name: light for name, (light, _) in COLOURS.items()}
MARKS = {"before": "o", "after": "s", "retrained": "^", "other1": "D", "other2": "v", "other3": "P", "other4": "X"}
RUNS = ("after", "other1", "other2", "other3", "other4")  # colours of several runs, in turn
WIDTH = 5.0  # inches; 360 points, about a phone's width, so that text keeps its size there
POINT = 9  # font size

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": POINT,
    "axes.titlesize": POINT,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK["line"],
    "axes.labelcolor": INK["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK["line"],
    "grid.linewidth": 0.6,
    "xtick.color": INK["line"],
    "ytick.color": INK["line"],
    "xtick.labelcolor": INK["soft"],
    "ytick.labelcolor": INK["soft"],
    "text.color": INK["ink"],
    "text.parse_math": False,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "lorasure",
    "path.simplify": True,
}


@dataclass(frozen=True)
class Chart:
    """A figure with what it says in words and the numbers it shows. `name`: the stem of its file."""

    name: str
    title: str
    description: str
    figure: Any
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save in our style; glyphs that the measuring font lacks are the viewer's to find."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """(figure, axes) `height` inches high, outside of pyplot and its global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def legend(axes: Any, **options: Any) -> None:
    """A legend above the axes, where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2, handlelength=1.6, **options)


def save(chart: Chart, kind: str) -> bytes:
    """The figure as a file for a paper, on white: `kind` is png (300 dpi) or svg."""
    buffer = io.BytesIO()
    options = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 300}
    with styled():
        chart.figure.savefig(buffer, format=kind, facecolor="white", **options)
    return buffer.getvalue()


def inline_svg(chart: Chart, prefix: str) -> str:
    """The figure as an SVG element: no size of its own, ids that begin with `prefix`, role, title and description."""
    from html import escape

    buffer = io.StringIO()
    with styled():
        chart.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.S)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r"<[^<>]+>", lambda found: _tag(found[0], prefix, used), body)
    body = re.sub(r"\n\s*", "\n", body)
    return (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box[1]}" role="img" '
        f'aria-labelledby="{prefix}-title {prefix}-desc"><title id="{prefix}-title">{escape(chart.title)}</title>'
        f'<desc id="{prefix}-desc">{escape(chart.description)}</desc>{body}'
    )


def _tag(tag: str, prefix: str, used: Container[str]) -> str:
    """A tag of matplotlib's for a page: ids of its own, the page's font and colours, hundredths of a point.

    What stands between tags is what the chart says, and stays as it is.
    """
    tag = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", tag)
    tag = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", tag)
    tag = re.sub(r' font-family: [^;"]*;| transform="rotate\(-0 [^"]*"', "", tag)
    tag = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", tag)
    for name, (light, _) in COLOURS.items():
        tag = tag.replace(light, f"var(--{name})")
    return tag


def number(value: float | None) -> str:
    """Four digits that matter."""
    return "" if value is None else f"{value:.4g}"


def texts(*values: Any) -> tuple[str, ...]:
    """Cells of a table: numbers shortened, None empty."""
    return tuple(number(v) if isinstance(v, float) or v is None else escaped(str(v)) for v in values)


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour name per series: a role has its own, runs take the others in turn."""
    runs = [name for name in names if name not in ("before", "retrained")]
    return {n: n if n not in runs else RUNS[runs.index(n) % len(RUNS)] for n in names}
