"""`lorasure compare`: runs side by side on standard output or in a file, for people, papers and programs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import artifacts
from ..errors import UsageError, escaped
from ..folders import check_new_file
from ..registry import lookup
from .read import read_runs
from .settings import CompareSettings
from .tables import NOTE, Row, Table, compare, shown


def compare_runs(paths: Sequence[Path], settings: CompareSettings) -> list[Table]:
    """Print or write the tables of `tables.compare`, and return them. Raises what that and `read_runs` do."""
    written = lookup(FORMATS, settings.format, "--format")
    out = Path(settings.out).expanduser() if settings.out else None
    if out:
        check_new_file(out, "--out", settings.overwrite, paths)
    runs = read_runs(paths)
    if len(runs) < 2:
        raise UsageError("lorasure compare needs two run folders at least.")
    tables = compare(runs)
    text = json.dumps(_to_json(tables), indent=2, allow_nan=False) + "\n" if settings.json else written(tables)
    if out:
        artifacts.write_text(out, text)
    else:
        sys.stdout.write(text)
    return tables


def _plain(tables: Sequence[Table]) -> str:
    """For a terminal, as wide as it is; in colour only where there is one."""
    from rich.console import Console
    from rich.table import Column
    from rich.table import Table as RichTable
    from rich.text import Text

    buffer = io.StringIO()
    console = Console(highlight=False)
    printed = Console(
        file=buffer, highlight=False, force_terminal=console.is_terminal, width=None if console.is_terminal else 200
    )
    for table in tables:
        columns = [Column(Text(escaped(c)), justify="right") for c in table.columns]
        shape = RichTable("", Column("score", no_wrap=True), *columns, "n", title=Text(escaped(table.title)))
        shape.title_justify = "left"
        for name, rows in table.groups.items():
            for row in rows:
                shape.add_row(name if row is rows[0] else "", row.name, *_marked(row), row.n)
            shape.add_section()
        printed.print(shape)
        for note in table.notes:
            printed.print(escaped(note), markup=False)
    printed.print(NOTE.replace("Bold", "Bold and *"), markup=False)
    return buffer.getvalue()


def _marked(row: Row) -> list[Any]:
    from rich.text import Text

    return [Text(f"{shown(s)} *", style="bold") if i in row.best else Text(shown(s)) for i, s in enumerate(row.cells)]


def _to_json(tables: Sequence[Table]) -> dict[str, Any]:
    """Suite, or check -> score name -> column -> the score's JSON, null where not measured."""
    return {
        table.suite: {
            row.key: {c: s and s.to_json() for c, s in zip(table.columns, row.cells, strict=True)} for row in table.rows
        }
        for table in tables
    }


def _markdown(tables: Sequence[Table]) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cell(text: str, best: bool) -> str:
        return f"**{_escaped(text, MARKDOWN)}**" if best else _escaped(text, MARKDOWN)

    parts = []
    for table in tables:
        rows = [line([_escaped(f"{r.set}: {r.name}", MARKDOWN), *_cells(r, cell)]) for r in table.rows]
        head = line(_escaped(text, MARKDOWN) for text in ("score", *table.columns))
        rule = "|---|" + "---:|" * len(table.columns)
        title, *notes = (_escaped(text, MARKDOWN) for text in (table.title, *table.notes))
        parts.append("\n\n".join([f"**{title}**", "\n".join([head, rule, *rows]), *notes]))
    return "\n\n".join([*parts, NOTE]) + "\n"


def _latex(tables: Sequence[Table]) -> str:
    def cell(text: str, best: bool) -> str:
        return (r"\textbf{" if best else "{") + _escaped(text, LATEX).replace("-", "$-$") + "}"

    parts = []
    for table in tables:
        lines = [["Score", *(_escaped(column, LATEX) for column in table.columns)]]
        lines += [[_escaped(f"{r.set}: {r.name}", LATEX), *_cells(r, cell)] for r in table.rows]
        head, *body = (f"{' & '.join(line)} \\\\" for line in lines)
        start = [f"% {escaped(table.title)}", rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule", head]
        end = [r"\bottomrule", r"\end{tabular}", *(f"% {escaped(note)}" for note in table.notes)]
        parts.append("\n".join([*start, r"\midrule", *body, *end]))
    return "\n\n".join([r"% needs \usepackage{booktabs}", *parts, f"% {NOTE}"]) + "\n"


def _cells(row: Row, written: Callable[[str, bool], str]) -> list[str]:
    return [written(shown(score), i in row.best) for i, score in enumerate(row.cells)]


def _escaped(text: str, special: Mapping[str, str]) -> str:
    return "".join(special.get(c, c) for c in escaped(text))


MARKDOWN = {c: f"\\{c}" for c in "\\`*_{}[]<>()#+!|~$"}
LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {"table": _plain, "markdown": _markdown, "latex": _latex}
