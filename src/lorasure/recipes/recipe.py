"""A recipe: one table of a paper as data. What is varied, the settings of every cell, and the published figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .. import artifacts
from ..config import ForgetSettings
from ..errors import DataError, UsageError
from ..registry import lookup
from ..yaml_file import read_yaml

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
Published = dict[str, dict[str, float]]
NEEDED = ("suite", "scores", "axes", "models")
FIGURES = ("published", "before", "gain")
SPLIT = "split"  # the axis, or setting, that names TOFU's forget set or MUSE's corpus


@dataclass(frozen=True)
class Cell:
    """`place`: axis -> value; `settings`: of `lorasure forget`; `published`: models -> score -> figure."""

    place: dict[str, str]
    settings: dict[str, Any]
    split: str | None
    published: Published

    @property
    def name(self) -> str:
        """Its values, `ihl/vila/forget05`."""
        return "/".join(self.place.values())


@dataclass(frozen=True)
class Gain:
    """A table that is published as gains: the mean over the last axis of `score`, less that of the value `against`.

    `axis`: the one that `against` is a value of; `published`: names without the last axis -> figure.
    """

    score: str
    axis: str
    against: str
    published: Published = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """`scores`: the columns. `before`: split -> published figures of the models before they forget.

    Published figures are those of `models`, or, if there are none of it, of all other models of the recipe.
    """

    title: str
    paper: str
    suite: str
    scores: tuple[str, ...]
    notes: tuple[str, ...]
    models: str
    cells: tuple[Cell, ...]
    before: dict[str, Published]
    gain: Gain | None

    def chosen(self, globs: str) -> list[Cell]:
        """The cells whose name fits one of the comma-separated globs; UsageError if one fits none."""
        wanted = [glob.strip() for glob in globs.split(",") if glob.strip()]
        for glob in wanted:
            if not any(fnmatchcase(cell.name, glob) for cell in self.cells):
                names = ", ".join(cell.name for cell in self.cells[:3])
                raise UsageError(f"--only {glob}: no cell has such a name. They are called {names}, ...; see --list.")
        return [cell for cell in self.cells if any(fnmatchcase(cell.name, glob) for glob in wanted)]


def read_recipe(name: str, models: str | None = None) -> Recipe:
    """A recipe of RECIPES or a file of that form, for one of its models (default: the first)."""
    path = Path(name) if name.endswith(".yaml") else lookup(RECIPES, name, "recipe")
    if not path.is_file():
        raise DataError(f"{path}: there is no such recipe.")
    content = read_yaml(path)
    with artifacts.as_written(path):
        _check_keys(path, content, ("title", "paper", "notes", "settings", "gain", *NEEDED))
        if missing := [key for key in NEEDED if key not in content]:
            raise DataError(f"{path}: needs {', '.join(missing)}.")
        models = models or next(iter(content["models"]))
        own = lookup(content["models"], models, f"models of {path.stem}") or {}
        sources = {models: own} if own.keys() & FIGURES else {k: v or {} for k, v in content["models"].items()}
        for part in (own, *sources.values()):
            _check_keys(path, part, ("settings", "tuned", *FIGURES))
        gain = content.get("gain")
        splits = {split for source in sources.values() for split in source.get("before", {})}
        return Recipe(
            content.get("title", path.stem),
            content.get("paper", ""),
            content["suite"],
            tuple(content["scores"]),
            tuple(content.get("notes", ())),
            models,
            tuple(_cells(path, content, own, sources)),
            {
                split: {name: source.get("before", {}).get(split, {}) for name, source in sources.items()}
                for split in splits
            },
            Gain(**gain, published={k: v["gain"] for k, v in sources.items() if "gain" in v}) if gain else None,
        )


def _cells(
    path: Path, content: Mapping[str, Any], own: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]
) -> list[Cell]:
    axes: Mapping[str, Mapping[str, Any]] = content["axes"]
    found = []
    for names in itertools.product(*axes.values()):
        place = dict(zip(axes, map(str, names), strict=True))
        settings = dict(content.get("settings", {}))
        for axis, value in zip(axes, names, strict=True):
            settings |= axes[axis][value] or {}
        settings |= own.get("settings", {})
        for row in own.get("tuned", ()):
            if all(place[axis] == str(row[axis]) for axis in axes if axis in row):
                settings |= {key: value for key, value in row.items() if key not in axes}
        split = place.get(SPLIT) or settings.pop(SPLIT, None)
        ForgetSettings.from_dict({"model": "m", "forget": "f", "retain": "r", "out": "o"} | settings)
        figures = {
            name: _published(path, source.get("published", {}), list(place.values()), axes)
            for name, source in sources.items()
        }
        found.append(Cell(place, settings, split, figures))
    return found


def _published(
    path: Path, figures: Mapping[str, Mapping[str, Sequence[float]]], names: list[str], axes: Mapping[str, Any]
) -> dict[str, float]:
    """Score -> figure of one cell. Figures stand under the names of all axes but the last, in a list along that."""
    *front, last = names
    along = [str(value) for value in list(axes.values())[-1]]
    found = {}
    for score, rows in figures.items():
        row = rows.get("/".join(front))
        if row is None:
            continue
        if len(row) != len(along):
            raise DataError(f"{path}: {score} of {'/'.join(front)} has {len(row)} figures, not {len(along)}.")
        if (figure := row[along.index(last)]) is not None:
            found[score] = float(figure)
    return found


def _check_keys(path: Path, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise DataError(f"{path}: unknown key '{key}'. Choose from: {', '.join(known)}.")
