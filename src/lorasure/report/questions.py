"""The table of single examples: what each model makes of each row; text only where it was kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..evaluate.evaluation import Record
from ..evaluate.metrics import extraction_strength
from .read import Suite

MEASURES = {"Probability": "nll", "Extraction": "correct", "ROUGE-L": "rouge_recall"}  # heading -> field of a record


@dataclass(frozen=True)
class Question:
    """`numbers`: a cell per column of the table. `texts`: what is said -> text, empty without --keep-text."""

    set: str
    row: int
    id: str | None
    numbers: tuple[float | None, ...]
    texts: dict[str, str]


@dataclass(frozen=True)
class Questions:
    """All examples of a suite. `columns`: headings of the numbers, a measure and a model each."""

    columns: tuple[str, ...]
    sets: tuple[str, ...]
    rows: tuple[Question, ...]


def questions(suite: Suite) -> Questions:
    """Every example of every set, with what all models of the suite made of it."""
    sets = {role: m.evaluation.sets for role, m in suite.models.items()}
    there = {f for found in sets.values() for records in found.values() for record in records for f in record}
    wanted = [(role, name) for name, field in MEASURES.items() if field in there for role in sets]
    first = next(iter(sets.values()))
    rows = []
    for name in first:
        by_row = {role: {r["row"]: r for r in found.get(name, ())} for role, found in sets.items()}
        for record in first[name]:
            seen = {role: records.get(record["row"], {}) for role, records in by_row.items()}
            numbers = tuple(_number(seen[role], MEASURES[measure]) for role, measure in wanted)
            rows.append(Question(name, record["row"], record["id"], numbers, _texts(seen)))
    return Questions(tuple(f"{m} {role}" for role, m in wanted), tuple(first), tuple(rows))


def _number(record: Record, field: str) -> float | None:
    value: Any = record.get(field)
    if value is None:
        return None
    if field == "nll":
        return math.exp(-value)
    return extraction_strength([[flag == "1" for flag in value]]).value if field == "correct" else value


def _texts(seen: dict[str, Record]) -> dict[str, str]:
    kept = {role: record["text"] for role, record in seen.items() if "text" in record}
    if not kept:
        return {}
    first = next(iter(kept.values()))
    own = {role: text["generated"] for role, text in kept.items() if text.get("generated") is not None}
    return {"question": first["question"], "true answer": first["answer"], **own}
