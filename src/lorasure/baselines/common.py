"""What every baseline ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import artifacts
from ..progress import peak_memory
from ..stages import mean_probability, update_summary, verdict
from ..workbench import Workbench


def probabilities(bench: Workbench, model: Any) -> dict[str, Any]:
    """Probability of the forget and of the scored retain examples under a model."""
    sets = {"forget": bench.data[0].examples, "retain": bench.scored_retain}
    with bench.reporter.stage("evaluate", sum(map(len, sets.values()))):
        return {name: mean_probability(bench, model, examples).to_json() for name, examples in sets.items()}


def score(bench: Workbench, run: Path, model: Any) -> None:
    """Scores of what was made, as it is loaded from its files, and the account of the run -> summary.json."""
    found = {"after": probabilities(bench, model), "peak_memory_bytes": peak_memory(), "versions": artifacts.versions()}
    update_summary(run, {"verdict": verdict(update_summary(run, found))})
