"""Logs of other programs <-> evaluations: TOFU's original aggregated log, and open-unlearning's TOFU_EVAL.json.

Both hold TOFU's four sets with the mean negative log-likelihoods per row, but neither says what was measured on what:
everything else in `about` is None, and so is the `id` of each record.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import artifacts
from ..errors import DataError, NumericError, UsageError
from .evaluation import ABOUT, SCORES, Evaluation, Record, read_evaluation
from .metrics import Score, extraction_strength, normalised_probability_values
from .tofu import FACTS, ratios

UNKNOWN = ("split", "model", "adapter", "template", "tokenizer", "dtype")  # what a log does not tell
BY_INDEX = "value_by_index"


@dataclass(frozen=True)
class Column:
    """Where a log keeps one field of a set: log[`part`][`table`][row], or [row][`key`] if there is a key.

    `instead`: the part that stands for it where a log has no such part.
    """

    part: str
    table: str
    key: str | None = None
    instead: str | None = None


@dataclass(frozen=True)
class Log:
    """A row of LOGS: the file's usual name, what stands for each of our sets, and the columns of such a set.

    Fields in `optional` may be absent as a whole: the program measures them on request.
    """

    title: str
    file: str
    sets: dict[str, str]
    columns: Callable[[str], dict[str, Column]]
    optional: tuple[str, ...] = ()


def _original(part: str) -> dict[str, Column]:
    tables = {
        "nll": "avg_gt_loss",
        "paraphrase_nll": "avg_paraphrased_loss",
        "wrong_nll": "average_perturb_loss",
        "rouge_recall": "rougeL_recall",
    }
    return {field: Column(part, table) for field, table in tables.items()}


def _open_unlearning(prefix: str) -> dict[str, Column]:
    """The two sets of facts have no paraphrases; there the answer itself stands for it."""
    answer = f"{prefix}_Q_A_Prob"
    instead = answer if prefix in ("ra", "wf") else None
    return {
        "nll": Column(answer, BY_INDEX, "avg_loss"),
        "paraphrase_nll": Column(f"{prefix}_Q_A_PARA_Prob", BY_INDEX, "avg_loss", instead),
        "wrong_nll": Column(f"{prefix}_Q_A_PERT_Prob", BY_INDEX, "avg_loss"),
        "rouge_recall": Column(f"{prefix}_Q_A_ROUGE", BY_INDEX, "rougeL_recall"),
    }


ORIGINAL = Log(
    "TOFU's aggregated log",
    "eval_log_aggregated.json",
    {
        "forget": "eval_log_forget.json",
        "retain": "eval_log.json",
        "real_authors": "eval_real_author_wo_options.json",
        "world_facts": "eval_real_world_wo_options.json",
    },
    _original,
)
OPEN_UNLEARNING = Log(
    "open-unlearning's TOFU log",
    "TOFU_EVAL.json",
    {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"},
    _open_unlearning,
    optional=("rouge_recall",),
)
LOGS = (ORIGINAL, OPEN_UNLEARNING)


def open_evaluation(path: Path) -> Evaluation:
    """The evaluation in a folder of `lorasure evaluate`, in a folder that holds one of LOGS, or in such a file.

    DataError if the path is none of these or the file has another shape, NumericError if a number is not finite.
    """
    path = path.expanduser()
    if (path / ABOUT).is_file():
        return read_evaluation(path)
    for file in (path, *(path / log.file for log in LOGS)):
        if file.is_file():
            return _read_log(file)
    if (path / SCORES).is_file():
        raise DataError(f"{path}: the records of this evaluation were removed; the scores are still in {SCORES}.")
    if (path / "config.json").is_file():
        raise DataError(
            f"{path}: a model, not an evaluation of one. Make that first: lorasure evaluate --model {path}."
        )
    names = ", ".join([ABOUT, *(log.file for log in LOGS)])
    raise DataError(f"{path}: no evaluation there. Looked for a folder with one of {names}, or the file of such a log.")


def _read_log(path: Path) -> Evaluation:
    content = artifacts.read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: an evaluation log must be a JSON object, found a {type(content).__name__}.")
    log = next((log for log in LOGS if any(c.part in content for c in _columns(log).values())), None)
    if log is None:
        looked = " or ".join(f"'{_columns(log)['forget', 'nll'].part}' ({log.title})" for log in LOGS)
        raise DataError(f"{path}: not an evaluation log that is known here. Looked for the key {looked}.")
    sets = {name: _records(path, content, log, name) for name in log.sets}
    about = {"kind": "log", "suite": "tofu", "log": log.title, **dict.fromkeys(UNKNOWN)}
    about["sets"] = {name: {"rows": len(records), "sha256": None} for name, records in sets.items()}
    return Evaluation(str(path), about, sets)


def _columns(log: Log) -> dict[tuple[str, str], Column]:
    return {(name, field): c for name, part in log.sets.items() for field, c in log.columns(part).items()}


def _records(path: Path, content: Mapping[str, Any], log: Log, name: str) -> list[Record]:
    columns = {
        field: _values(path, content, column, many=field == "wrong_nll")
        for field, column in log.columns(log.sets[name]).items()
        if column.part in content or field not in log.optional
    }
    rows = columns["nll"].keys()
    for field, values in columns.items():
        if values.keys() != rows:
            row = min(values.keys() ^ rows)
            raise DataError(f"{path}: set '{name}' has row {row} with one of 'nll' and '{field}', but not with both.")
    return [{"row": row, "id": None} | {f: values[row] for f, values in columns.items()} for row in sorted(rows)]


def _values(path: Path, content: Mapping[str, Any], column: Column, many: bool) -> dict[int, Any]:
    """Row -> number, or list of numbers, of one column."""
    part = column.instead if column.instead and column.part not in content else column.part
    place = f"'{part}'"
    table = _member(path, _member(path, content, part, "the log"), column.table, place)
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path}: '{column.table}' of {place} must be an object with a value per row.")
    found = {}
    for index, value in table.items():
        if not (index.isascii() and index.isdigit() and len(index) < 10):
            raise DataError(f"{path}: '{column.table}' of {place} has the row {index[:20]!r}, must be a number.")
        where = f"row {index} of {place}"
        if column.key:
            value = _member(path, value, column.key, where)
        _check(path, value, many, f"'{column.key or column.table}' of {where}")
        found[int(index)] = value
    return found


def _member(path: Path, holder: Any, key: str, name: str) -> Any:
    if not isinstance(holder, dict):
        raise DataError(f"{path}: {name} must be an object, found a {type(holder).__name__}.")
    if key not in holder:
        raise DataError(f"{path}: {name} has no '{key}'.")
    return holder[key]


def _check(path: Path, value: Any, many: bool, what: str) -> None:
    numbers = value if many and isinstance(value, list) else [] if many else [value]
    if not numbers or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
        raise DataError(f"{path}: {what} must be a {'list of numbers' if many else 'number'}.")
    wrong = [v for v in numbers if not abs(v) <= sys.float_info.max]
    if wrong:
        raise NumericError(f"{path}: {what} is {float(wrong[0])}, must be finite.")


def write_log(path: Path, evaluation: Evaluation, scores: Mapping[str, Score]) -> None:
    """Write an evaluation on TOFU as open-unlearning's TOFU_EVAL.json, for its tools; `scores` are those of the suite.

    What was not measured (ROUGE without generation, the forget quality without a reference) is left out. Its extraction
    strength is that program's own, which drops the last label.
    """
    if evaluation.about["suite"] != "tofu":
        raise UsageError(f"--write-log needs an evaluation on tofu, {evaluation.source} is on another suite.")
    content: dict[str, Any] = {}
    for name, prefix in OPEN_UNLEARNING.sets.items():
        content |= _set_tables(evaluation, name, prefix, scores)
    if evaluation.has("forget", "correct"):
        each = [extraction_strength([row], compat="open-unlearning").value for row in evaluation.correct("forget")]
        content["extraction_strength"] = _table(evaluation, "forget", {"score": each})
    content["model_utility"] = {"agg_value": scores["model_utility"].value}
    content["forget_quality"] = {"agg_value": scores["forget_quality"].extra.get("p")}
    artifacts.write_json(path, {key: value for key, value in content.items() if value["agg_value"] is not None})


def _set_tables(evaluation: Evaluation, name: str, prefix: str, scores: Mapping[str, Score]) -> dict[str, Any]:
    """The tables that the program makes of one set."""
    found: dict[str, Any] = {}
    for field, column in _open_unlearning(prefix).items():
        if field == "rouge_recall" and not evaluation.has(name, field):
            continue
        values = evaluation.column(name, field)
        if column.instead and values == evaluation.column(name, "nll"):
            continue
        own = {"prob": _probabilities(values)} if column.key == "avg_loss" else {}
        found[column.part] = _table(evaluation, name, own | {str(column.key): values})
    truth = "forget_truth_ratio" if name == "forget" else f"{prefix}_Truth_Ratio"
    found[truth] = _table(evaluation, name, {"score": ratios(evaluation, name)}, scores[f"{name}_truth_ratio"].value)
    if name in FACTS:
        shares = normalised_probability_values(*(evaluation.column(name, field) for field in ("nll", "wrong_nll")))
        found[f"{prefix}_Q_A_Prob_normalised"] = _table(evaluation, name, {"prob": shares})
    return found


def _probabilities(nll: Sequence[Any]) -> list[Any]:
    return [[math.exp(-n) for n in v] if isinstance(v, list) else math.exp(-v) for v in nll]


def _table(
    evaluation: Evaluation, name: str, columns: Mapping[str, Sequence[Any]], value: float | None = None
) -> dict[str, Any]:
    """{agg_value, value_by_index}; the value is the mean of the first column unless given."""
    first = next(iter(columns.values()))
    rows = zip(evaluation.records(name), *columns.values(), strict=True)
    by_index = {str(record["row"]): dict(zip(columns, values, strict=True)) for record, *values in rows}
    mean = fmean(fmean(v) if isinstance(v, list) else v for v in first)
    return {"agg_value": mean if value is None else value, BY_INDEX: by_index}
