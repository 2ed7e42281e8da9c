"""`lorasure probe`: before anything is forgotten, does the model know it?"""

from __future__ import annotations

from dataclasses import replace

from .data.examples import Example
from .data.load import DataSet, load_data
from .data.pairing import sample
from .data.readers import check_disjoint
from .evaluate.collect import own_text
from .evaluate.known import exchanged, known_scores
from .evaluate.metrics import Score
from .evaluate.settings import ProbeSettings
from .forward import answer_records
from .models import load_model, load_tokenizer, pick_device, pick_dtype, pick_token_budget
from .progress import Reporter

NOTHING_FOUND = 10  # exit code


def probe(settings: ProbeSettings, reporter: Reporter | None = None) -> dict[str, Score]:
    """Exact memorisation, extraction strength and Min-K++ of a text against a control, and the verdict.

    The score `verdict` is 1 if the text is known, 0 if nothing was found, undefined in between; its `text` says so in
    words and its `control` says what the control is and what follows from it. Writes nothing.
    """
    s, reporter = settings, reporter or Reporter(quiet=True)
    device = pick_device(s.device)
    with reporter.held():
        tokenizer = load_tokenizer(s.model, s.revision, allow_pickle=s.allow_pickle)
        with reporter.stage("read data"):
            data = load_data(s.text, s, tokenizer)
            given = load_data(s.control, s, tokenizer) if s.control else None
            if given:
                check_disjoint(data.read.rows, given.read.rows)
            text = _drawn(data, s)
            control = _drawn(given, s) if given else exchanged(text, data.encoded.most)
        with reporter.stage("load model"):
            options = {"revision": s.revision, "allow_pickle": s.allow_pickle, "quantize": s.quantize}
            model = load_model(s.model, dtype=pick_dtype(s.dtype, device), device=device, **options)
    budget = pick_token_budget(s.tokens_per_batch, device)
    with reporter.stage("probe", len(text) + len(control)) as progress:
        sides = [(answer_records(model, side, budget, progress, moments=True), side) for side in (text, control)]
    end = tokenizer.eos_token_id
    records = [[own_text(record, example, end) for record, example in zip(*side, strict=True)] for side in sides]
    return known_scores(*records, given=given is not None)


def _drawn(data: DataSet, settings: ProbeSettings) -> list[Example]:
    """At most --rows examples, drawn by the seed."""
    found = [_with_prompt(example) for example in data.examples]
    return [found[i] for i in sample(len(found), min(len(found), settings.rows), settings.seed)]


def _with_prompt(example: Example) -> Example:
    """The example, or, where nothing but a begin of text stands before the answer, its second half given its first."""
    return example if example.answer_start > 1 else replace(example, answer_start=len(example) // 2)
