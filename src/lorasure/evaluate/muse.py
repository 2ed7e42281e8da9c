"""MUSE (arXiv 2407.06460): verbatim memorisation, knowledge memorisation and privacy leakage, on News or Books."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ..data.examples import Row
from ..data.readers import DOCUMENTS, READERS, read_rows
from ..data.rows import Layout
from ..errors import DataError
from ..registry import lookup
from .evaluation import Evaluation
from .items import EvaluationSet, Generation
from .membership import auc, privleak
from .metrics import Score, mean_score
from .settings import SuiteSettings
from .tofu import NOT_GENERATED, capped, memorisation, prefixed

HOMES = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
LONGEST = 2048  # tokens of the published texts at most, so none of them is cut
CONTINUED = Generation(128, stem=False, clip=True)
ANSWERED = Generation(32, ("\n\n", "\nQuestion", "Question:"), stem=False)
SPLIT = "news"  # unless another is named
GENERATED = {"verbmem_forget": 0, "knowmem_forget": 1, "knowmem_retain": 2}  # bootstrap seeds: one per set
TABLES = [suffix for suffix in READERS if suffix not in DOCUMENTS]


def load(settings: SuiteSettings) -> list[EvaluationSet]:
    """The sets of --split from the hub, or from a folder of the same layout; lengths are the benchmark's own."""
    home = lookup(HOMES, settings.split or SPLIT, "--split")
    data = settings.data or home
    rows = {"verbmem_forget": continuations(data)}
    rows |= {f"knowmem_{part}": questions(data, part) for part in ("forget", "retain")}
    rows |= {f"privleak_{part}": texts(data, part) for part in ("forget", "holdout", "retain")}
    return [_set(name, capped(found, settings.max_rows), settings.generate) for name, found in rows.items()]


def _set(name: str, rows: tuple[Row, ...], generate: bool) -> EvaluationSet:
    if name not in GENERATED:
        return EvaluationSet(name, rows, membership=True, max_length=LONGEST)
    generation = CONTINUED if name == "verbmem_forget" else ANSWERED
    return EvaluationSet(name, rows, generation if generate else None, max_length=LONGEST)


def source(data: str, config: str, split: str) -> str:
    """What `read_rows` takes for a part of the data: the hub's name for it, or the file in a folder of that layout.

    That is CONFIG/SPLIT with the ending .jsonl, .json, .csv or .parquet, or CONFIG/SPLIT-00000-of-00001.parquet, as the
    hub's files are called. DataError unless there is exactly one.
    """
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return f"{data}:{config}:{split}"
    name = re.compile(re.escape(split) + r"(-\d+-of-\d+)?")
    found = [p for p in sorted((folder / config).glob(f"{split}*")) if p.suffix in TABLES and name.fullmatch(p.stem)]
    if len(found) != 1:
        several = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{folder}: expected one file {config}/{split} ({', '.join(TABLES)}), found {several}.")
    return str(found[0])


def continuations(data: str) -> list[Row]:
    """Beginnings of texts to forget and how they go on, joined as they are."""
    rows = read_rows(source(data, "verbmem", "forget"), Layout(prompt_key="prompt", answer_key="gt")).rows
    return [replace(row, kind="completion") for row in rows]


def questions(data: str, part: str) -> list[Row]:
    """Questions on the texts to forget or to keep, each after the same answered ones, as a text to be continued."""
    examples = read_rows(source(data, "knowmem", f"{part}_qa_icl")).rows
    shown = "".join(f"{_asked(row)}{row.answer}\n\n" for row in examples)
    rows = read_rows(source(data, "knowmem", f"{part}_qa")).rows
    return [replace(row, prompt=shown + _asked(row), kind="completion") for row in rows]


def _asked(row: Row) -> str:
    return f"Question: {row.prompt}\nAnswer: "


def texts(data: str, part: str) -> list[Row]:
    """Texts of a set for membership inference, each whole, in one window."""
    return [replace(row, kind="completion") for row in read_rows(source(data, "privleak", part)).rows]


def score(evaluation: Evaluation, reference: Evaluation | None) -> dict[str, Score]:
    """ROUGE-L F1 of what was generated, PrivLeak with the AUCs it rests on, and memorisation of the texts to forget.

    `privleak_forget_auc` and `privleak_retain_auc` are of Min-K against the holdout, 1 if the set looks learnt.
    """
    found = {name: _rouge(evaluation, name, seed) for name, seed in GENERATED.items()}
    known = _auc(evaluation, "forget")
    found["privleak"] = privleak(known, _auc(reference, "forget") if reference else None)
    found |= {"privleak_forget_auc": known, "privleak_retain_auc": _auc(evaluation, "retain")}
    return found | prefixed("verbmem_forget", memorisation(evaluation, "verbmem_forget"))


def _rouge(evaluation: Evaluation, name: str, seed: int) -> Score:
    if not evaluation.has(name, "rouge_f1"):
        return Score(None, len(evaluation.records(name)), reason=NOT_GENERATED)
    return mean_score(evaluation.column(name, "rouge_f1"), seed=seed, what=name)


def _auc(evaluation: Evaluation, part: str) -> Score:
    learnt, unseen = (evaluation.column(f"privleak_{name}", "min_k") for name in (part, "holdout"))
    return auc(learnt, unseen)
