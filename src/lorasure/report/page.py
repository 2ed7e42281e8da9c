"""`lorasure report`: one HTML file that holds everything it shows and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from .. import __version__, artifacts
from ..errors import UsageError, escaped
from ..folders import check_new_file
from ..registry import lookup
from .contents import Contents, contents, tradeoff
from .read import read_runs
from .settings import ReportSettings
from .style import COLOURS, Chart, inline_svg, save
from .tables import NOTE, Table, compare, run_names, shown

MARK = "<!-- lorasure report -->"
PLOTS = {"png": "pixels, 300 dpi", "svg": "vectors"}


def report(paths: Sequence[Path], settings: ReportSettings) -> Path:
    """Write the report on the runs among `paths` and what belongs to them; returns its place.

    An earlier report there is replaced; any other file is refused, and a place in a finished run. Raises what
    `read_runs` does.
    """
    if settings.plots is not None:
        lookup(PLOTS, settings.plots, "--plots")
    runs = read_runs(paths)
    first = runs[0].folder.resolve()
    out = Path(settings.out).expanduser() if settings.out else first.with_name(f"{first.name}-report.html")
    if out.exists() and not (out.is_file() and MARK in _head(out)):
        raise UsageError(f"--out {out}: this is not an earlier report. Choose another name.")
    check_new_file(out, "--out", overwrite=True, reads=())
    compared = compare(runs) if len(runs) > 1 else []
    found = [contents(name, run) for name, run in zip(run_names(runs), runs, strict=True)]
    artifacts.write_text(out, render(found, compared))
    if settings.plots:
        folder = out.with_name(f"{out.stem}-plots")
        for name, chart in _all_charts(found, compared).items():
            artifacts.write_bytes(folder / f"{name}.{settings.plots}", save(chart, settings.plots))
    return out


def _head(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(200).decode("utf-8", "replace")


def _all_charts(found: Sequence[Contents], compared: Sequence[Table]) -> dict[str, Chart]:
    """Every chart by the stem of its file; of several runs (of one name, even) and suites, each has its own."""
    drawn = {f"compare-{table.suite}-{chart.name}": chart for table in compared if (chart := tradeoff(table))}
    for number, part in enumerate(found, 1):
        run = f"{number}-{Path(part.name).name}-" if len(found) > 1 else ""
        for m in part.measurements:
            drawn |= {f"{run}{m.table.suite}-{chart.name}": chart for chart in m.charts}
        drawn |= {f"{run}{chart.name}": chart for chart in (part.training, part.importance, *part.attacks) if chart}
    return {"".join(c if c.isalnum() or c in "-_." else "-" for c in name): chart for name, chart in drawn.items()}


def render(found: Sequence[Contents], compared: Sequence[Table]) -> str:
    """The whole page. Everything that comes from a run is escaped; the one script is allowed by its hash alone."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("lorasure.report"), finalize=_visible, **options)
    count = iter(range(10**6))
    environment.filters["svg"] = lambda chart: Markup(inline_svg(chart, f"c{next(count)}"))
    environment.filters["shown"] = shown
    folder = files("lorasure.report") / "templates"
    script, style = ((folder / name).read_text("utf-8") for name in ("page.js", "page.css"))
    return environment.get_template("page.html").render(
        runs=found,
        compared=[(table, tradeoff(table)) for table in compared],
        note=NOTE,
        version=__version__,
        mark=Markup(MARK),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        colours=COLOURS,
    )


def _visible(value: Any) -> Any:
    """Text with control characters and marks of writing direction made visible; line breaks stay."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return "\n".join(map(escaped, value.split("\n")))
    return value
