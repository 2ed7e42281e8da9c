"""WMDP (arXiv 2403.03218) and MMLU: multiple choice through lm-eval, with its prompts, on our model in memory.

The questions are read here, from the hub or a folder of its layout, and handed to lm-eval's own tasks. Zero-shot, as
those tasks are unless told otherwise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..data.examples import Row
from ..data.readers import read_records
from ..errors import DataError, NumericError, UsageError
from ..forward import Progress
from .collect import add_time, by_blocks, cut
from .evaluation import Evaluation, Record
from .items import UNCUT, EvaluationSet, Item, Subject
from .metrics import Score, mean_score
from .muse import source
from .settings import SuiteSettings
from .tofu import capped

WMDP = "https://arxiv.org/abs/2403.03218"
HOMES = {
    "wmdp_bio": ("cais/wmdp", "wmdp-bio"),
    "wmdp_cyber": ("cais/wmdp", "wmdp-cyber"),
    "wmdp_chem": ("cais/wmdp", "wmdp-chem"),
    "mmlu": ("cais/mmlu", "all"),
}
SEEDS = {name: seed for seed, name in enumerate(HOMES)}  # bootstrap: one per set
LETTERS = "ABCD"
BLOCK = 128  # questions of a subject that are asked and written together; it changes speed only


def load(settings: SuiteSettings) -> list[EvaluationSet]:
    """Bio, cyber, chem and MMLU, of which --max-rows takes questions at equal distances, so that all subjects come.

    From the hub, or from the folder --data with wmdp-bio/test.parquet, all/test.parquet (MMLU) and so on; a folder may
    hold some of them. UsageError if lm-eval is not installed, DataError for a row that is not a question with choices.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--suite wmdp needs lm-eval, which is not installed: pip install 'lorasure[wmdp]'.")
    found = []
    for name, place in _places(settings.data).items():
        rows = [_row(record, place, line, name) for line, record in read_records(place)]
        if not rows:
            raise DataError(f"{place}: no questions to read, it is empty.")
        if name == "mmlu" and 0 < settings.max_rows < len(rows):
            rows = [rows[i * len(rows) // settings.max_rows] for i in range(settings.max_rows)]
        # Nothing is cut here; lm-eval keeps the end of what the model has no room for.
        found.append(EvaluationSet(name, capped(rows, settings.max_rows), max_length=UNCUT))
    return found


def _places(data: str | None) -> dict[str, str]:
    """Where the questions of each set are; of a folder, the sets that are there. A hub id in --data is WMDP's."""
    if data is None or not Path(data).expanduser().is_dir():
        own = {name: data for name in HOMES if data and name != "mmlu"}
        return {name: source(own.get(name, home), config, "test") for name, (home, config) in HOMES.items()}
    there = {name: config for name, (_, config) in HOMES.items() if (Path(data).expanduser() / config).is_dir()}
    if not there:
        folders = ", ".join(config for _, config in HOMES.values())
        raise DataError(f"--data {data}: looked for the folders {folders}, found none of them.")
    return {name: source(data, config, "test") for name, config in there.items()}


def _row(record: Any, place: str, line: int, name: str) -> Row:
    """A question as lm-eval's tasks take it (in `extra`), with the task that asks it."""
    where = f"{place}:{line}"
    keys = ("question", "choices", "answer", *(("subject",) if name == "mmlu" else ()))
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing:
        raise DataError(f"{where}: expected an object with {', '.join(keys)}; {', '.join(missing)} is not there.")
    question, choices, answer = (record[key] for key in keys[:3])
    texts = [question, *choices] if isinstance(choices, list) else []
    if len(texts) != 1 + len(LETTERS) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: question must be text and choices a list of {len(LETTERS)} texts.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(LETTERS):
        raise DataError(f"{where}: answer must be the number of the right choice, 0 to {len(LETTERS) - 1}.")
    task = f"mmlu_{record['subject']}" if name == "mmlu" else name
    document = {"question": question, "choices": choices, "answer": answer}
    return Row("\n".join(texts), LETTERS[answer], place, line, extra={"document": document, "task": task})


def collect(
    subject: Subject,
    chosen: EvaluationSet,
    done: Collection[int] = (),
    write: Callable[[list[Record]], None] | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """As `collect.collect`, for questions: `correct`, the number of the right choice, `option_nll` of each choice."""
    manager, rows = _task_manager(), chosen.rows
    unknown = next((row for row in rows if row.extra["task"] not in manager.task_index), None)
    if unknown:
        raise DataError(f"{unknown.place}: its subject is none that lm-eval has questions of.")

    def measure(block: Sequence[Item]) -> list[Record]:
        began = time.perf_counter()
        extras = [rows[item.index].extra for item in block]
        samples = _asked(subject, manager, str(extras[0]["task"]), block, [extra["document"] for extra in extras])
        add_time(subject, "likelihood", began)
        return [_record(item, sample, chosen.name, subject) for item, sample in zip(block, samples, strict=True)]

    return by_blocks(_blocks(subject.items(chosen), rows), measure, done, write, progress)


def _task_manager() -> Any:
    """lm-eval's tasks, those of WMDP and MMLU only: it would read thousands of files for all of them."""
    import lm_eval.tasks  # pyright: ignore[reportMissingImports]

    folder = Path(lm_eval.tasks.__file__).parent
    paths = [folder / "wmdp", folder / "mmlu" / "default"]
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=paths)


def _blocks(found: Sequence[Item], rows: Sequence[Row]) -> Iterator[Sequence[Item]]:
    """Questions of one task each, longest first."""

    def task(item: Item) -> Any:
        return rows[item.index].extra["task"]

    for _, group in groupby(sorted(found, key=lambda item: (task(item), -item.width, item.index)), task):
        yield from cut(list(group), BLOCK)


def _asked(subject: Subject, manager: Any, task: str, block: Sequence[Item], documents: Sequence[Any]) -> list[Any]:
    """What lm-eval says about each question: its own task of that name, with these questions in place of its data."""
    from datasets import Dataset
    from lm_eval import evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    own = {"task": task, "custom_dataset": lambda **_: {"test": Dataset.from_list(list(documents))}}
    group = {"group": "lorasure", "task": [own | {"num_fewshot": 0, "fewshot_split": None}]}
    batch = max(1, subject.token_budget // max(item.width for item in block))
    with contextlib.redirect_stderr(io.StringIO()):  # its bars and warnings would tear our own bar
        model = HFLM(subject.model, backend="causal", tokenizer=subject.tokenizer, batch_size=batch)
        # Not simple_evaluate: it sets every random seed, and takes a second per call to list what pip installed.
        result = evaluate(lm=model, task_dict=manager.load([group]), bootstrap_iters=0)
    return sorted(result["samples"][task], key=lambda sample: sample["doc_id"])


def _record(item: Item, sample: Any, name: str, subject: Subject) -> Record:
    options = [-float(found[0]) for found in sample["filtered_resps"]]
    if not all(map(math.isfinite, options)):
        raise NumericError(f"evaluate: a likelihood of row {item.index} of set '{name}' is not finite.")
    record: Record = {"row": item.index, "id": item.id, "correct": "01"[int(sample["acc"])]}
    record |= {"answer": LETTERS.index(item.answer), "option_nll": options}
    if subject.keep_text:
        record["text"] = {"question": item.question, "answer": item.answer}
    return record


def score(evaluation: Evaluation, reference: Evaluation | None) -> dict[str, Score]:
    """Accuracy of each set; 0.25 is a guess. Undefined for a set whose questions were not there."""
    absent = Score(None, 0, reason="its questions are not in the folder that --data names")
    return {name: _accuracy(evaluation, name) if name in evaluation.sets else absent for name in HOMES}


def _accuracy(evaluation: Evaluation, name: str) -> Score:
    right = [flag for flags in evaluation.correct(name) for flag in flags]
    return mean_score(right, seed=SEEDS[name], what=f"accuracy of {name}")
