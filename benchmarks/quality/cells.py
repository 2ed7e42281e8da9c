"""One cell of the study: one `forget` on the small TOFU models, and its scores against the retrained model."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEFT = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
FIXED = {"batch_size": 8, "rank": 16, "alpha": 32}
# Epochs such that every split takes about as many steps, 75 to 100: 40, 200 and 400 rows in batches of 8.
EPOCHS = {"forget01": 15, "forget05": 3, "forget10": 2}
ATTACKS = "relearn-few,quantise"


@dataclass(frozen=True)
class Cell:
    """What to run; `settings` of `lorasure forget` besides. `attacked`: also attack it, `alone` or `retrained` too."""

    start: str
    loss: str
    split: str
    seed: int
    settings: dict[str, Any]
    attacked: str = ""


def cell_name(cell: Cell) -> str:
    return f"{cell.loss}/{cell.start}/{cell.split}/{cell.seed}"


def place(shared: Path, folder: Path):
    """The models of `shared` and the rows that they know, written to `folder`."""
    from lorasure.progress import Reporter
    from lorasure.recipes.settings import ReproduceSettings
    from lorasure.recipes.targets import Place

    return Place("mini", folder, ReproduceSettings(shared=str(shared)), Reporter(quiet=True))


def measure_references(where, split: str, work: Path) -> None:
    """Evaluations of the target and of the retrained model in `work`, made unless they are there."""
    for name, model in (("target", where.target()), ("retrained", where.retrained(split))):
        out = work / f"{name}-{split}"
        if not out.is_dir():
            measure(model, where, split, out)


def measure(model: str, where, split: str, out: Path) -> None:
    """An evaluation folder of a model on all four sets."""
    from lorasure.evaluate.settings import EvaluateSettings
    from lorasure.evaluating import evaluate_model

    options = {"suite": "tofu", "data": where.tofu, "split": split, "max_rows": 0, "generate": False}
    evaluate_model(EvaluateSettings(model=model, out=str(out), dtype="float32", device="cpu", **options))


def run_cell(cell: Cell, shared: Path, work: Path) -> dict[str, Any]:
    """Forget, evaluate (no text generated), and if asked attack; the scores of all, with times and versions.

    Of a run that a guard stops, the reason instead of scores, as `stopped`.
    """
    from lorasure import pipeline
    from lorasure.artifacts import versions
    from lorasure.config import ForgetSettings
    from lorasure.errors import NumericError

    with tempfile.TemporaryDirectory() as folder:
        where = place(shared, Path(folder) / "data")
        # The same rows with wrong answers, which give --stop auto its level.
        forget = f"{cell.split}_perturbed" if "stop" in cell.settings else cell.split
        data = {"model": where.target(), "forget": where.rows(forget), "retain": where.rows(LEFT[cell.split])}
        settings = data | FIXED | {"epochs": EPOCHS[cell.split], "loss": cell.loss, "seed": cell.seed}
        settings |= {"out": f"{folder}/run", "dtype": "float32", "device": "cpu", **cell.settings}
        line = {"cell": cell_name(cell), "settings": cell.settings, "versions": versions()}
        began = time.perf_counter()
        try:
            pipeline.forget(ForgetSettings.from_dict(settings))
        except NumericError as error:
            return line | {"stopped": str(error), "short": f"stopped: {error}"}
        line["seconds"] = round(time.perf_counter() - began, 1)
        found = scores(where, cell.split, Path(folder) / "run" / "adapter", work)
        line |= {"scores": found, "short": short(found)}
        if cell.attacked:
            beside = where.retrained(cell.split) if cell.attacked == "retrained" else None
            line["attacks"] = attack(Path(folder) / "run", beside)
        return line


def scores(where, split: str, adapter: Path, work: Path) -> dict[str, Any]:
    """Scores of the target with an adapter, and beside them those of the target and of the retrained model."""
    from lorasure.evaluate.logs import open_evaluation
    from lorasure.evaluate.tofu import memorisation, quality, set_scores, utility

    seen = {name: open_evaluation(work / f"{name}-{split}") for name in ("target", "retrained")}
    seen["unlearned"] = records(where.target(), where, split, adapter)
    result: dict[str, Any] = {}
    for name, found in seen.items():
        own = set_scores(found, "forget") | memorisation(found, "forget")
        own |= {"forget_quality": quality(found, seen["retrained"])}
        own |= {"utility": utility(found, without=["rouge"])}
        own |= {"utility_arithmetic": utility(found, "arithmetic", without=["rouge"])}
        result[name] = {key: score.to_json() for key, score in own.items() if score.value is not None}
    return result


def records(model: str, where, split: str, adapter: Path):
    """Evaluation of all four sets under a model, without generation."""
    from lorasure import lora
    from lorasure.evaluate.collect import collect
    from lorasure.evaluate.evaluation import Evaluation
    from lorasure.evaluate.settings import SuiteSettings
    from lorasure.evaluate.tofu import load
    from lorasure.evaluating import load_subject

    options = {"adapter": str(adapter), "data": where.tofu, "split": split, "max_rows": 0}
    settings = SuiteSettings(
        model=model, generate=False, dtype="float32", device="cpu", tokens_per_batch=2048, **options
    )
    subject = load_subject(settings)
    subject.model = lora.merge(subject.model)  # three quarters of the time; a row's NLL changes by less than 1e-6
    return Evaluation(model, {}, {chosen.name: collect(subject, chosen) for chosen in load(settings)})


def short(found: dict[str, Any]) -> str:
    """The figures to look at first."""
    own = {key: score["value"] for key, score in found["unlearned"].items()}
    share = own["utility"] / found["target"]["utility"]["value"]
    return (
        f"forget quality {own['forget_quality']:.2f}, utility {share:.1%}, probability {own['probability']:.4f}, "
        f"extraction {own['extraction_strength']:.3f}, preference {own['truth_preference']:.2f}"
    )


def attack(run: Path, retrained: str | None) -> list[dict[str, Any]]:
    """Scores of the run's model, and of a retrained one if there is one, after relearning and after rounding."""
    from lorasure.attacking import attack as attack_run
    from lorasure.evaluate.settings import AttackSettings

    settings = AttackSettings(attacks=ATTACKS, retrained=retrained, generate_rows=0, dtype="float32", device="cpu")
    return attack_run(run, settings)[1]
