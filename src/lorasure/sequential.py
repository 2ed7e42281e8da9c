"""`lorasure sequence`: requests applied one after another, and every earlier one measured again after each.

The folder holds ledger.json and a run per request (request-1, ...), each on the model that the one before left, merged.
It grows: called again with more requests, only the new ones are applied. All steps are measured on the same rows to
keep: called again with others, which a new request may ask for, all are measured again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from . import artifacts, evaluating, folders, pipeline
from .config import ForgetSettings, Settings
from .data.examples import Row
from .data.load import layout, rows_hash
from .data.readers import check_disjoint, read_rows
from .errors import ANEW, GOES_ON, DataError, UsageError
from .evaluate.collect import collect
from .evaluate.evaluation import Evaluation
from .evaluate.items import EvaluationSet
from .evaluate.metrics import Score
from .evaluate.muse import source
from .evaluate.settings import EvaluateSettings, SequenceSettings, SuiteSettings
from .evaluate.tofu import capped, memorisation, prefixed, set_scores
from .model_files import locate, weight_files
from .progress import Reporter
from .registry import lookup

LEDGER = "ledger.json"
BEFORE = "before"
READ = ("template", "max_length", "stride", "dtype")  # settings that a measured value depends on
MEASURED = ("probability", "exact_memorisation", "extraction_strength")  # what needs no generation
FOLDS = 4  # requests of MUSE's protocols
S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Protocol:
    """MUSE's requests are CONFIG/forget_1 to forget_4. `chained`: each starts from the model that the last one left."""

    title: str
    chained: bool


PROTOCOLS = {
    "sust": Protocol("sustainability: requests one after another", chained=True),
    "scal": Protocol("scalability: growing requests, each on the original model", chained=False),
}


@dataclass(frozen=True)
class Plan:
    """Sources of the requests, in order, and of the rows to keep. `data`: MUSE's, evaluated after each request."""

    requests: tuple[str, ...]
    retain: str
    chained: bool = True
    data: str | None = None


@dataclass(frozen=True)
class Step:
    """A request to apply: its number from 1, its run folder, and the settings it is run with."""

    number: int
    run: Path
    settings: ForgetSettings

    @property
    def name(self) -> str:
        """Its name in the ledger, for what was measured when it had been applied."""
        return f"after_{self.number}"


def plan(places: Sequence[Path], settings: SequenceSettings) -> Plan:
    """What is asked for: files of requests, or a folder (or hub id) of MUSE's data and a protocol."""
    if settings.protocol is None:
        if settings.retain is None:
            raise UsageError("lorasure sequence needs --retain, the rows to keep.")
        return Plan(tuple(map(str, places)), settings.retain)
    protocol = lookup(PROTOCOLS, settings.protocol, "--protocol")
    if len(places) != 1:
        raise UsageError(f"--protocol {settings.protocol} wants one place, MUSE's data, got {len(places)}.")
    data = str(places[0])
    requests = tuple(source(data, settings.protocol, f"forget_{fold}") for fold in range(1, FOLDS + 1))
    return Plan(requests, settings.retain or source(data, "raw", "retain1"), protocol.chained, data)


def sequence(
    places: Sequence[Path], settings: SequenceSettings, reporter: Reporter | None = None
) -> dict[str, dict[str, Score]]:
    """Apply the requests and measure all of them after each; returns step -> score name -> Score, as in ledger.json.

    Steps are `before`, `after_1`, ...; names `request_1_probability`, ..., `retain_probability` and, in a protocol,
    those of MUSE. A request whose run is there already is not applied again; when one fails, the runs before it stay.
    Raises UsageError if the folder holds other requests, and all that `pipeline.forget` raises.
    """
    reporter = reporter or Reporter(quiet=True)
    asked = plan(places, settings)
    rows = [read_rows(request, layout(settings)).rows for request in asked.requests]
    kept = read_rows(asked.retain, layout(settings)).rows
    for request in rows:
        check_disjoint(request, kept)
    requests = {f"request_{number}": request for number, request in enumerate(rows, 1)}
    ledger = Ledger(settings, asked, rows, kept, reporter)
    model = settings.model
    for number, request in enumerate(rows, 1):
        step = _step(number, model, asked, settings)
        with _kept(settings):
            if not _applied(step, request):
                pipeline.forget(step.settings, reporter)
                ledger.drop_from(number)
            if number == 1:  # not earlier: a wrong setting shows in the first run, which leaves nothing behind
                ledger.measure(BEFORE, None, requests | {"retain": kept})
            ledger.measure(step.name, step, dict(islice(requests.items(), number)) | {"retain": kept})
        model = str(step.run / artifacts.MERGED) if asked.chained else model
    for line in came_back(ledger.measured) if asked.chained else ():
        reporter.note(line)
    return ledger.measured


@contextmanager
def _kept(settings: SequenceSettings) -> Iterator[None]:
    """An error gets a note of what becomes of the requests that were applied, unless it has one of a part of a run."""
    try:
        yield
    except BaseException as error:
        applied = Path(settings.out, "request-1").is_dir()
        refused = isinstance(error, UsageError | DataError)  # the same command would be refused again
        if applied and not refused and not getattr(error, "__notes__", ()):
            error.add_note(ANEW if settings.overwrite else GOES_ON)
        raise


def came_back(measured: Mapping[str, Mapping[str, Score]]) -> list[str]:
    """A line per request that a later one made the model know again: its probability's interval is above the first."""
    lines = []
    steps = [name for name in measured if name != BEFORE]
    for number in range(1, len(steps) + 1):
        own, *later = (measured[step][f"request_{number}_probability"] for step in steps[number - 1 :])
        for after, now in enumerate(later, number + 1):
            if own.high is not None and now.low is not None and now.low > own.high:
                lines.append(f"Request {number} came back after request {after}: {own.value:.3f} -> {now.value:.3f}.")
                break
    return lines


def _step(number: int, model: str, asked: Plan, settings: SequenceSettings) -> Step:
    run = Path(settings.out) / f"request-{number}"
    rows = {"forget": asked.requests[number - 1], "retain": asked.retain}
    merge = asked.chained or settings.merge
    return Step(number, run, _as(ForgetSettings, settings, **rows, model=model, out=str(run), merge=merge))


def _as(kind: type[S], settings: SequenceSettings, **own: Any) -> S:
    """Settings of another command with the values that both have, where they apply.

    A revision is the original model's, and there is something to resume in one of the folders at most.
    """
    shared = {f.name: getattr(settings, f.name) for f in fields(kind) if hasattr(settings, f.name)} | own
    if shared["model"] != settings.model:
        shared["revision"] = None
    if shared.get("resume") and not folders.holds_progress(folders.partial_of(Path(shared["out"]))):
        shared |= {"resume": False} | ({"allow_change": ""} if "allow_change" in shared else {})
    return kind(**shared)


def _applied(step: Step, rows: Sequence[Row]) -> bool:
    """Whether the step's run is there, to stay. UsageError if it is another request's, or on another model."""
    if step.settings.overwrite or not step.run.exists():
        return False
    artifacts.check_run(step.run, artifacts.DATA, artifacts.SUMMARY)
    with artifacts.as_written(step.run):
        request = artifacts.read_json(step.run / artifacts.DATA)["forget"]["sha256"]
        base = artifacts.read_json(step.run / artifacts.SUMMARY)["base"]["files"]
    if request != rows_hash(rows):
        raise UsageError(
            f"{step.run} holds another request than {step.settings.forget}. Give all requests in the order in which "
            "they were applied, new ones last, or choose another --out."
        )
    s = step.settings
    folder = locate(s.model, s.revision, s.allow_pickle)
    if base != {path.name: artifacts.sha256(path) for path in weight_files(folder, s.allow_pickle)}:
        raise UsageError(f"{step.run} was made from another model than {s.model}; choose another --out.")
    return True


class Ledger:
    """ledger.json: the requests, by source, number of rows and hash, and what was measured, on what, at each step."""

    def __init__(
        self,
        settings: SequenceSettings,
        asked: Plan,
        rows: Sequence[Sequence[Row]],
        kept: Sequence[Row],
        reporter: Reporter,
    ) -> None:
        self.settings, self.asked, self.reporter, self.out = settings, asked, reporter, Path(settings.out)
        first = self.out / "request-1"
        ours = any(path.exists() for path in (self.out / LEDGER, first, folders.partial_of(first)))
        if self.out.is_dir() and any(self.out.iterdir()) and not ours:
            raise UsageError(f"--out {self.out}: the folder is not empty and holds no {LEDGER}; choose another one.")
        if (self.out / f"request-{len(rows) + 1}").exists():
            raise UsageError(f"--out {self.out} holds more than {len(rows)} requests; give all of them, new ones last.")
        self.about = {
            "kind": "sequence",
            "chained": asked.chained,
            "requests": [
                {"source": request, "rows": len(found), "sha256": rows_hash(found), "run": f"request-{number}"}
                for number, (request, found) in enumerate(zip(asked.requests, rows, strict=True), 1)
            ],
            "measured_on": {"retain": rows_hash(kept)} | {name: getattr(settings, name) for name in READ},
        }
        there = (self.out / LEDGER).exists() and not settings.overwrite
        with artifacts.as_written(self.out / LEDGER):
            ledger = artifacts.read_json(self.out / LEDGER) if there else self.about | {"measured": {}}
            stored = ledger["measured"]
            self.measured = {  # in the order of the steps, which a JSON file does not keep
                step: {name: Score.from_json(score) for name, score in stored[step].items()}
                for step in [BEFORE, *(f"after_{number}" for number in range(1, len(rows) + 1))]
                if step in stored
            }
            same = ledger.get("measured_on") == self.about["measured_on"]
        if not same:
            self.measured = {}
            reporter.note("Measured on other rows to keep, or in another way, until now: every step is measured again.")

    def drop_from(self, number: int) -> None:
        """Forget what was measured when this request, now applied anew, and later ones had been applied."""
        kept = [BEFORE, *(f"after_{earlier}" for earlier in range(1, number))]
        self.measured = {step: scores for step, scores in self.measured.items() if step in kept}
        self._write()  # before anything is measured: a command that goes on would take the old for the new

    def measure(self, name: str, step: Step | None, sets: Mapping[str, Sequence[Row]]) -> None:
        """Scores of the sets, and MUSE's in a protocol, on the model of a step, unless they are in the ledger."""
        if all(f"{each}_{MEASURED[0]}" in self.measured.get(name, {}) for each in sets):
            return
        model = {"model": step.settings.model, "adapter": str(step.run)} if step else {"model": self.settings.model}
        found = _scores(_as(SuiteSettings, self.settings, **model), sets, self.reporter)
        if self.asked.data:
            muse = {"suite": "muse", "data": self.asked.data, "out": str(self.out / f"muse_{name}"), "overwrite": True}
            muse |= {"retain": None, "split": None}  # of forgetting, not of MUSE
            found |= evaluating.evaluate_model(_as(EvaluateSettings, self.settings, **model, **muse), self.reporter)
        self.measured[name] = found
        self._write()

    def _write(self) -> None:
        plain = {
            step: {key: score.to_json() for key, score in scores.items()} for step, scores in self.measured.items()
        }
        self.out.mkdir(mode=0o700, parents=True, exist_ok=True)
        artifacts.write_json(self.out / LEDGER, self.about | {"measured": plain})


def _scores(settings: SuiteSettings, sets: Mapping[str, Sequence[Row]], reporter: Reporter) -> dict[str, Score]:
    """MEASURED of every set on one model, which is loaded once."""
    with reporter.stage("load model"):
        subject = evaluating.load_subject(settings)
    chosen = [EvaluationSet(name, capped(rows, settings.max_rows)) for name, rows in sets.items()]
    with reporter.stage("ledger", sum(len(subject.items(s)) for s in chosen)) as progress:
        records = {s.name: collect(subject, s, progress=progress) for s in chosen}
    evaluation = Evaluation(settings.model, {}, records)
    found: dict[str, Score] = {}
    for name in records:
        scores = set_scores(evaluation, name) | memorisation(evaluation, name)
        found |= prefixed(name, {key: scores[key] for key in MEASURED})
    return found
