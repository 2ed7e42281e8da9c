"""The study's tables, made of what is stored: into docs/study.md and the README, between their marks."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from cells import LEFT
from scipy.stats import t as student

# The README's rows: our default, then what else there is, each start with our loss and with the published one.
FIRST = [
    (loss, start)
    for loss in ("bga", "bigram", "ihl")
    for name in ("contrast", "lora", "fila", "vila", "reglu")
    for start in ((name,) if name == "contrast" else (name, f"{name}, 95% kept"))
]
Lines = list[dict[str, Any]]


def write_tables(stored: Path, root: Path) -> None:
    """Replace the marked parts of both pages."""
    runs, attacked = lines_of(stored / "runs.jsonl"), lines_of(stored / "attacks.jsonl")
    tuned = {path.stem.removeprefix("tune-"): json.loads(path.read_text()) for path in stored.glob("tune-*.json")}
    parts = {"tuned": tuned_table(tuned), "explained": explained_table(tuned.values())}
    parts |= {"runs": runs_table(runs), "attacks": attacks_table(attacked)}
    replace_marked(root / "docs" / "study.md", parts)
    replace_marked(root / "README.md", {"study": first_table(runs)})


def lines_of(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def replace_marked(page: Path, parts: dict[str, str]) -> None:
    """What stands between `<!-- NAME -->` and `<!-- end NAME -->` becomes parts[NAME]."""
    text = page.read_text()
    for name, new in parts.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, rest = text.split(opening)
        text = before + opening + new + "\n" + closing + rest.split(closing)[1]
    page.write_text(text)


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """Markdown; `head` is the first line without its outer bars."""
    rule = "|".join("---" for _ in head.split("|"))
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def tuned_table(groups: dict[str, Any]) -> str:
    """Every method's trials and the settings that were chosen among them."""
    from study import GROUPS, STARTS, chosen

    rows = []
    for group in (g for g in GROUPS if g in groups):
        picked = {start: settings for start, _, settings in chosen(group, list(STARTS))}
        for start in GROUPS[group][1]:
            trials = [line for line in groups[group]["trials"] if line["method"] == start]
            stopped = sum(line["state"] == "stopped" for line in trials)
            settings = picked.get(start, {})
            best = next((line for line in trials if line["params"].items() <= settings.items()), None)
            found = ["none"] * 4 if best is None else trial_columns(best)
            rows.append([GROUPS[group][0], start, f"{len(trials)} ({stopped})", *found])
    return table("loss | start | trials (stopped) | chosen | utility | extraction strength | truth preferred", rows)


def trial_columns(line: dict[str, Any]) -> list[str]:
    s, params = line["scores"], ", ".join(f"{k} {v:.2g}" for k, v in line["params"].items())
    return [params, f"{s['share']:.1%}", f"{s['extraction_strength']:.3f}", f"{s['truth_preference']:.2f}"]


def explained_table(groups: Iterable[dict[str, Any]]) -> str:
    """How much of what differs between a loss's trials its settings explain: adjusted R2 of linear models, cumulated.

    Of log10 of the forget probability, and of the share of utility, over all starts' trials that ended. The learning
    rate comes as log and log squared, other settings as log, the start as one indicator each.
    """
    ended: dict[str, Lines] = {}
    for group in groups:
        found = [line for line in group["trials"] if line["state"] == "complete"]
        ended.setdefault(group["about"]["loss"], []).extend(found)
    rows = []
    for loss, trials in sorted(ended.items()):
        names = [name for name in trials[0]["params"] if name != "lr"]
        rate = np.log([line["params"]["lr"] for line in trials])
        others = np.log([[line["params"][name] for name in names] for line in trials])
        methods = sorted({line["method"] for line in trials})
        starts = np.array([[line["method"] == name for name in methods] for line in trials], dtype=float)
        models = [[rate, rate**2], [rate, rate**2, others], [rate, rate**2, others, starts]]
        known = np.log10([line["scores"]["forget_probability"] for line in trials])
        kept = np.array([line["scores"]["share"] for line in trials])
        cells = [explained(np.column_stack(columns), y) for y in (known, kept) for columns in models]
        rows.append([loss, str(len(trials)), *cells])
    heads = (f"{what}: rate alone | all settings | and the start" for what in ("forget probability", "utility"))
    return table(" | ".join(["loss | trials that ended", *heads]), rows)


def explained(columns: np.ndarray, y: np.ndarray) -> str:
    """Adjusted R2 of least squares with a constant: 1 - variance of what is left / variance of y; "-": too few rows."""
    design = np.column_stack([np.ones(len(y)), columns])
    free = len(y) - np.linalg.matrix_rank(design)
    left = y - design @ np.linalg.lstsq(design, y)[0]
    return f"{1 - left @ left / free / y.var(ddof=1):.2f}" if free else "-"


def grouped(runs: Lines) -> dict[tuple[str, str, str], Lines]:
    """(loss, split, start) -> its runs that ended, one per seed; the splits in order of size."""
    found: dict[tuple[str, str, str], Lines] = {}
    for split in LEFT:
        for line in runs:
            loss, start, own, _ = line["cell"].split("/")
            if own == split and "stopped" not in line:
                found.setdefault((loss, split, start), []).append(line)
    return found


def runs_table(runs: Lines) -> str:
    """Every start, loss and split at its chosen settings: means over the seeds that ended."""
    rows, stopped = [], Counter(line["cell"].rsplit("/", 1)[0] for line in runs if "stopped" in line)
    for (loss, split, start), lines in sorted(grouped(runs).items(), key=lambda item: item[0][:2]):
        known = spread(values(lines, "probability"), ".4f"), f"{values(lines, 'probability', 'retrained')[0]:.4f}"
        strength = f"{mean(values(lines, 'extraction_strength')):.3f}"
        seconds = f"{mean([line['seconds'] for line in lines]):.0f} s"
        without = stopped[f"{loss}/{start}/{split}"]
        seeds = f"{len(lines)}, {without} stopped" if without else str(len(lines))
        columns = [distance(lines), *known, strength, preference(lines), seconds]
        rows.append([loss, split, start, seeds, quality(lines), utility(lines), *columns])
    head = "loss | split | start | seeds | log10 forget quality | utility | D | forget probability | retrained | "
    return table(head + "extraction strength | truth preferred | time", rows)


def first_table(runs: Lines) -> str:
    """The README's: our losses and ihl, from our default start and from the published ones; the retrained model."""
    found, rows = grouped(runs), []
    for loss, start in FIRST:
        lines = {split: found.get((loss, split, start)) for split in LEFT}
        if lines["forget05"]:
            qualities = (quality(own) if own else "-" for own in lines.values())
            kept = (f"{mean(shares(own)):.1%}" if own else "-" for own in lines.values())
            rows.append([loss, start, *qualities, ", ".join(kept)])
    measured = {split: own for (_, split, _), own in found.items()}
    kept = (f"{shares(measured[split], 'retrained')[0]:.1%}" if split in measured else "-" for split in LEFT)
    rows.append(["-", "the retrained model", "0", "0", "0", ", ".join(kept)])
    return table("loss | start | forget01 | forget05 | forget10 | utility of the three", rows)


def attacks_table(lines: Lines) -> str:
    """Extraction strength before and after each attack, of every unlearned model; last of the retrained one."""
    rows: dict[str, list[list[str]]] = {"unlearned": [], "retrained": []}
    for line in (line for line in lines if "stopped" not in line):
        loss, start, _, _ = line["cell"].split("/")
        for subject, names in (("unlearned", [loss, start]), ("retrained", ["-", "the retrained model"])):
            if own := [found for found in line["attacks"] if found["subject"] == subject]:
                rows[subject].append([*names, *(attacked(own, *key) for key in POINTS)])
    head = "loss | start | not attacked | 8 bit | 4 bit | 20 steps of relearning | 100 steps"
    return table(head, [*sorted(rows["unlearned"]), *rows["retrained"][:1]])


POINTS = [("none", None), ("quantise", 8), ("quantise", 4), ("relearn-few", 20), ("relearn-few", 100)]


def attacked(lines: Lines, attack: str, point: int | None) -> str:
    found = next((line for line in lines if (line["attack"], line["point"]) == (attack, point)), None)
    return f"{found['scores']['extraction_strength']['value']:.3f}" if found else "-"


def values(lines: Lines, score: str, model: str = "unlearned") -> list[float]:
    return [line["scores"][model][score]["value"] for line in lines]


def quality(lines: Lines) -> str:
    return spread(values(lines, "forget_quality"), ".2f")


def utility(lines: Lines) -> str:
    return spread(shares(lines), ".1%")


def shares(lines: Lines, model: str = "unlearned") -> list[float]:
    """Utility as shares of the target's."""
    pairs = zip(values(lines, "utility", model), values(lines, "utility", "target"), strict=True)
    return [own / target for own, target in pairs]


def distance(lines: Lines) -> str:
    """Mean KS statistic, and how many rows both models answered."""
    scores = [line["scores"]["unlearned"]["forget_quality"] for line in lines]
    return f"{mean([score['statistic'] for score in scores]):.3f} (n {scores[0]['n']})"


def preference(lines: Lines) -> str:
    return f"{mean(values(lines, 'truth_preference')):.2f}"


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def spread(numbers: list[float], form: str) -> str:
    """The mean, and half the width of its 95 % interval over seeds (Student's t)."""
    average, n = mean(numbers), len(numbers)
    if n < 2:
        return f"{average:{form}}"
    deviation = math.sqrt(sum((x - average) ** 2 for x in numbers) / (n - 1))
    return f"{average:{form}} ± {student.ppf(0.975, n - 1) * deviation / math.sqrt(n):{form}}"
