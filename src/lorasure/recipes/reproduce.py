"""`lorasure reproduce`: every cell of a recipe is one `forget` and one evaluation; then published beside ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import artifacts, folders
from ..config import ForgetSettings, Settings
from ..errors import GOES_ON, NumericError, UsageError
from ..evaluate.evaluation import ABOUT, SCORES
from ..evaluate.settings import EvaluateSettings
from ..evaluating import evaluate_model
from ..pipeline import ANY_TIME, forget
from ..progress import Reporter
from ..yaml_file import read_yaml
from .recipe import Cell, Published, Recipe, read_recipe
from .settings import ReproduceSettings
from .targets import LEFT, Place

Figures = dict[str, float | None]


def _of_evaluation(*names: str) -> Callable[[Mapping[str, Any], Path], float | None]:
    """The first of some scores that is defined."""
    return lambda scores, run: next(
        (s["value"] for n in names if (s := scores.get(n)) and s["value"] is not None), None
    )


def _hours(scores: Mapping[str, Any], run: Path) -> float | None:
    summary = run / artifacts.SUMMARY
    return sum(artifacts.read_json(summary)["seconds"].values()) / 3600 if summary.is_file() else None


def _gigabytes(scores: Mapping[str, Any], run: Path) -> float | None:
    stored = run / artifacts.IMPORTANCE
    return stored.stat().st_size / 1e9 if stored.is_file() else None


# What a recipe's `scores` may name, other than scores of its suite: from an evaluation's scores and the run.
MEASURES: dict[str, Callable[[Mapping[str, Any], Path], float | None]] = {
    "model_utility": _of_evaluation("model_utility", "model_utility_without_rouge"),
    "hours": _hours,
    "map_gigabytes": _gigabytes,
}


@dataclass(frozen=True)
class Line:
    """A row of the table: the figures of a model, published and ours. `failed`: why there are none of ours."""

    name: str
    published: Published
    ours: Figures
    failed: str = ""


def reproduce(name: str, settings: ReproduceSettings, reporter: Reporter | None = None) -> tuple[Recipe, list[Line]]:
    """Run the chosen cells that are not finished yet; the recipe, and a line for each cell and each model before.

    A cell whose training diverges is a line that says so. Everything stays in --out, for other recipes too.
    """
    recipe = read_recipe(name, settings.models)
    cells = recipe.chosen(settings.only)
    if settings.list:
        return recipe, [Line(cell.name, cell.published, {}) for cell in cells]
    reporter = reporter or Reporter(quiet=True)
    out = Path(settings.out or f"runs/reproduce/{recipe.models}")
    bench = _Bench(recipe, settings, Place(recipe.models, out, settings, reporter), reporter)
    try:
        lines = {split: bench.before(split) for split in dict.fromkeys(cell.split for cell in cells)}
        return recipe, [*lines.values(), *(bench.cell(Path(name).stem, cell) for cell in cells)]
    except BaseException as error:
        if not isinstance(error, UsageError):
            error.add_note(GOES_ON)
        raise


@dataclass(frozen=True)
class _Bench:
    recipe: Recipe
    settings: ReproduceSettings
    place: Place
    reporter: Reporter

    def before(self, split: str | None) -> Line:
        """The model as it is before it forgets."""
        own = self._evaluated(self.place.out / f"target-{split or self.recipe.suite}", split, self.place.target())
        return Line(
            f"before ({split or self.place.name})", self.recipe.before.get(split or "", {}), self._figures(own, own)
        )

    def cell(self, recipe: str, cell: Cell) -> Line:
        """One `forget` and one evaluation, as far as they are not there yet."""
        run = self.place.out / recipe / cell.name.replace("/", "-")
        try:
            self._forgotten(run, cell)
        except NumericError as error:
            return Line(cell.name, cell.published, {}, str(error))
        after = run.with_name(f"{run.name}-after")
        return Line(
            cell.name,
            cell.published,
            self._figures(self._evaluated(after, cell.split, self.place.target(), str(run)), run),
        )

    def _forgotten(self, run: Path, cell: Cell) -> None:
        s, data = self.settings, {}
        if cell.split in LEFT:
            data = {"forget": self.place.rows(cell.split), "retain": self.place.rows(LEFT[cell.split])}
        own = {"model": self.place.target(), "out": str(run), "seed": s.seed, "device": s.device}
        own |= {"epochs": s.epochs} if s.epochs else {}
        resume = {"resume": folders.holds_progress(folders.partial_of(run))}
        settings = ForgetSettings.from_dict({**self.place.row.settings, **data, **cell.settings, **own, **resume})
        if (run / artifacts.MANIFEST).is_file():
            artifacts.check_run(run, artifacts.CONFIG)
            _check_same(run, read_yaml(run / artifacts.CONFIG), settings)
            return
        self.reporter.note(f"{cell.name}:")
        forget(settings, self.reporter)

    def _evaluated(self, out: Path, split: str | None, model: str, adapter: str | None = None) -> Path:
        """The evaluation folder of a model, made if it is not there; that of a retrained one is the reference."""
        suite, s = self.recipe.suite, self.settings
        settings = EvaluateSettings(
            **self.place.row.settings,
            model=model,
            adapter=adapter,
            suite=suite,
            split=split,
            data=self.place.tofu if suite == "tofu" else None,
            max_rows=self.place.row.rows,
            generate=s.generate or suite != "tofu",
            reference=None if out.name.startswith("retrained") else self._reference(split),
            device=s.device,
            seed=s.seed,
            out=str(out),
            resume=folders.holds_progress(folders.partial_of(out)),
        )
        if (out / artifacts.MANIFEST).is_file():
            artifacts.check_run(out, ABOUT)
            _check_same(out, artifacts.read_json(out / ABOUT)["settings"], settings)
        else:
            evaluate_model(settings, self.reporter)
        return out

    def _reference(self, split: str | None) -> str | None:
        found = self.place.retrained(split)
        if found is None or (Path(found) / ABOUT).is_file() or not _is_model(found):
            return found
        return str(self._evaluated(self.place.out / f"retrained-{split}", split, found))

    def _figures(self, evaluation: Path, run: Path) -> Figures:
        artifacts.check_run(evaluation, SCORES)
        scores = artifacts.read_json(evaluation / SCORES)
        return {name: MEASURES.get(name, _of_evaluation(name))(scores, run) for name in self.recipe.scores}


def _check_same(folder: Path, stored: Mapping[str, Any], wanted: Settings) -> None:
    """UsageError unless what is kept was made with the settings that are wanted now."""
    for name, value in wanted.located().items():
        if name not in ANY_TIME and stored.get(name) != value:
            raise UsageError(f"{folder} was made with {name} {stored.get(name)}, not {value}; choose another --out.")


def _is_model(name: str) -> bool:
    """A model folder, or a hub id: not the log of another program's evaluation."""
    return not Path(name).exists() or (Path(name) / "config.json").is_file()
