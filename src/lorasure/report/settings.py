"""Settings of the commands that show results; as in config.py, flags and help texts are made from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Settings, option
from ..evaluate.settings import JsonSettings


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """All settings of `lorasure report`."""

    out: str | None = option(None, "the HTML file (default: RUN-report.html beside the first run)", path=True)
    plots: str | None = option(
        None, "png or svg: also write every chart as a file, into a folder beside the report, for papers"
    )


@dataclass(frozen=True, kw_only=True)
class CompareSettings(JsonSettings):
    """All settings of `lorasure compare`."""

    format: str = option("table", "table, markdown, or latex (needs the package booktabs)")
    out: str | None = option(None, "write to this file instead of standard output", path=True)
    overwrite: bool = option(False, "replace the file --out")
