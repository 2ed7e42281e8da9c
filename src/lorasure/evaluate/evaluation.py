"""An evaluation: what was measured (about), and one record per example of every set. No model, no tensor.

A record is a JSON object. `row`, the example's index in its set from 0, and `id`, the start of a sha256 over its text,
are always there; the rest is what was measured (FIELDS). Records never hold text unless the user asked for it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import artifacts
from ..errors import DataError, NumericError

ABOUT = "evaluation.json"
RECORDS = "records"
HIDDEN = "hidden.safetensors"
SCORES = "scores.json"
Record = dict[str, Any]

FIELDS = {
    "row": "index of the example in its set, from 0",
    "id": "first 16 hex digits of sha256 over prompt and answer",
    "tokens": "answer tokens, end of text included",
    "nll": "mean negative log-likelihood of the answer, nats per token",
    "correct": "a character per answer token, for completions and running text without end of text: 1 if the label is "
    "the most probable token, else 0",
    "paraphrase_nll": "nll of the paraphrased answer; that of the answer where the set has no paraphrases",
    "wrong_nll": "list: nll of each wrong answer",
    "min_k": "mean of the lowest 40 % of the answer's log-probabilities, nats; without end of text, like the next two",
    "min_k_plus_plus": "the same, each log-probability standardised by the model's own distribution at that token",
    "zlib": "mean log-probability, nats, over the bytes of the compressed answer",
    "gradient_norm": "Euclidean norm of the gradient of nll with respect to all weights",
    "rouge_recall": "ROUGE-L recall of the generated answer against the true one, in [0, 1]; of stems, but for MUSE",
    "rouge_f1": "ROUGE-L F1 of the same, in [0, 1]",
    "refused": "1 if the generated answer is a refusal, else 0",
    "repetition": "of the generated answer, as are the next two: see behaviour.py",
    "ngram_entropy": "bits",
    "compression_ratio": "bytes per compressed byte",
    "generated_tokens": "tokens of the generated answer, end of text not counted",
    "answer": "multiple choice: number of the right choice, from 0; `correct` then has one character for the choice",
    "option_nll": "multiple choice: list: negative log-likelihood of each choice, nats",
    "text": "only with --keep-text: question, answer, generated",
}


@dataclass(frozen=True)
class Evaluation:
    """`about`: suite, split, model, adapter, template, tokenizer, sets (rows and hash of each). `sets`: the records.

    `hidden`: for some sets the mean hidden states of the first rows, (layers, rows, width), see inside.py; under
    `SET original` those of the same model without its adapter. `source` names it in messages.
    """

    source: str
    about: dict[str, Any]
    sets: dict[str, list[Record]]
    hidden: Mapping[str, Any] = field(default_factory=dict)

    def records(self, name: str) -> list[Record]:
        """The records of a set; DataError if there is none."""
        if name not in self.sets:
            raise DataError(f"{self.source}: there is no set '{name}'. It has: {', '.join(self.sets)}.")
        return self.sets[name]

    def has(self, name: str, field: str) -> bool:
        """Whether every record of a set has the field."""
        return name in self.sets and all(field in record for record in self.sets[name])

    def column(self, name: str, field: str) -> list[Any]:
        """One field of all records of a set, in row order. DataError if absent, NumericError if not finite."""
        found = []
        for record in self.records(name):
            if field not in record:
                raise DataError(f"{self.source}: row {record['row']} of set '{name}' has no '{field}'.")
            value = record[field]
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(v, float) and not math.isfinite(v) for v in numbers):
                raise NumericError(f"{self.source}: '{field}' of row {record['row']} of set '{name}' is not finite.")
            found.append(value)
        return found

    def correct(self, name: str) -> list[list[bool]]:
        """The field `correct` as one list of bools per record."""
        return [[flag == "1" for flag in flags] for flags in self.column(name, "correct")]


def check_comparable(one: Evaluation, other: Evaluation) -> None:
    """DataError unless scores of both mean the same thing: suite, template, tokenizer, and rows.

    What one of them does not know (a log of another program has no hashes) is not compared; the number of rows always.
    """
    both = f"{one.source} and {other.source} cannot be compared"
    for key in ("suite", "split", "template", "tokenizer"):
        a, b = one.about.get(key), other.about.get(key)
        if a is not None and b is not None and a != b:
            raise DataError(f"{both}: their {key} differs ({a}, {b}).")
    for name in [name for name in one.sets if name in other.sets]:
        a, b = len(one.records(name)), len(other.records(name))
        if a != b:
            raise DataError(f"{both}: set '{name}' has {a} rows in one, {b} in the other.")
        ids = [(x["id"], y["id"], x["row"]) for x, y in zip(one.sets[name], other.sets[name], strict=True)]
        different = [row for x, y, row in ids if x is not None and y is not None and x != y]
        if different:
            raise DataError(f"{both}: row {different[0]} of set '{name}' is another one.")
        a, b = (evaluation.about.get("sets", {}).get(name, {}).get("tokens") for evaluation in (one, other))
        if a is not None and b is not None and a != b:
            raise DataError(
                f"{both}: the rows of set '{name}' are the same, but not their tokens (chat template, "
                "perturbed_answer, paraphrased_answer, --seed, --max-length)."
            )


class RecordFile:
    """records/<set>.jsonl of an evaluation under way: blocks of records are appended, so a killed run loses one block.

    What is there already is read when it is opened; a torn last line is cut off.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / RECORDS / f"{name}.jsonl"
        self.records: list[Record] = []
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            self.records = [json.loads(line) for line in whole.splitlines()]
            artifacts.write_text(self.path, whole)

    def append(self, records: Sequence[Record]) -> None:
        """Add a block, whole unless the process dies in the middle, and sync it."""
        text = "".join(_line(record) for record in records)
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.records += records

    def close(self) -> list[Record]:
        """Put the records into row order, in the file too; returns them."""
        ordered = sorted(self.records, key=lambda record: record["row"])
        artifacts.write_text(self.path, "".join(map(_line, ordered)))
        return ordered


def _line(record: Record) -> str:
    try:
        return json.dumps(record, allow_nan=False) + "\n"
    except ValueError as error:
        raise NumericError(f"evaluate: a value of row {record['row']} is not finite.") from error


def read_evaluation(folder: Path) -> Evaluation:
    """What `lorasure evaluate` wrote, verified against its manifest."""
    artifacts.check_run(folder, ABOUT)
    about = artifacts.read_json(folder / ABOUT)
    names = [f"{RECORDS}/{name}.jsonl" for name in about["sets"]]
    artifacts.check_run(folder, *names)
    sets = {name: _read_records(folder / path) for name, path in zip(about["sets"], names, strict=True)}
    hidden = {}
    if (folder / HIDDEN).is_file():
        artifacts.check_run(folder, HIDDEN)
        hidden = {name: tensor.numpy() for name, tensor in artifacts.read_tensors(folder / HIDDEN)[0].items()}
    return Evaluation(str(folder), about, sets, hidden)


def _read_records(path: Path) -> list[Record]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a file of records ({type(error).__name__}).") from error


def write_scores(folder: Path, scores: Mapping[str, Any]) -> None:
    """scores.json: score name -> its JSON."""
    artifacts.write_json(folder / SCORES, {name: score.to_json() for name, score in scores.items()})
