"""Settings of `lorasure search`; as in config.py, flags and help texts are made from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import option, required
from ..evaluate.settings import JsonSettings


@dataclass(frozen=True, kw_only=True)
class SearchSettings(JsonSettings):
    """All settings of `lorasure search`."""

    out: str = required("the folder of the search, which several machines may share")
    resume: bool = option(
        False, "go on with the search in --out, or join it from another terminal or machine, with the same SPEC"
    )
    trials_only: bool = option(
        False, "stop when all trials are finished: make no runs of the best, measure no forget quality"
    )
    workers: int = option(1, "processes here that run trials; each of them loads the model", low=1)
