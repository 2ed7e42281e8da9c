"""One trial: the stages of `forget` on a model loaded once, stopped when it breaks the floor, and its scores."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import artifacts, lora, pipeline
from ..checkpoint import Utility
from ..config import ForgetSettings
from ..errors import DataError, NumericError, ResourceError, UsageError, is_out_of_memory
from ..lock import queued
from ..progress import Reporter
from ..stages import measure_importance
from ..train_stage import train_adapter
from ..workbench import Workbench, ignored
from .choose import COMPLETE, objective
from .measure import Measure
from .spec import Spec, corners
from .study import LOCKS, STOPPED, Trial

IMPORTANCE = "importance"
# Utility dips while the learning rate is high and mostly comes back as that falls, so that on the way more may be lost
# than in the end: this many times as much again at the start of the schedule, and none of it at the end.
DIP = 4
FITTED = ("rank", "targets", "exclude", "loss", "pairing", "stop")  # settings that must fit the model or the data
MOST = 64  # combinations of them that are tried


class Broken(Exception):
    """A trial keeps only `share` of the utility, too little to come back above the floor: it is over."""

    def __init__(self, step: int, share: float) -> None:
        super().__init__(f"utility {share:.3f} of the original's after step {step}")
        self.share = share


@dataclass
class Floor(Utility):
    """Raises Broken after an epoch that loses too much (DIP); the `last` step is left to the full evaluation."""

    last: int = 0

    def take(self, step: int) -> bool:
        """Measure at a step. No state is set aside: what a trial ends with is what `forget` would hand over."""
        super().take(step)
        share = float(self.shares[-1][1])
        if 1 - share > (1 - self.floor) * (1 + DIP * (1 - step / self.last)) and step < self.last:
            raise Broken(step, share)
        return False


class Runner:
    """What a worker loads once for all of its trials: the model, and the data to forget, to keep and to measure on."""

    def __init__(self, folder: Path, spec: Spec, reporter: Reporter, device: str) -> None:
        self.folder, self.spec, self.device = folder, spec, device
        self.bench = Workbench(replace(spec.base, device=device), reporter)
        self.measure = Measure(folder, spec, self.bench)
        self.bench.prepare()

    def check(self) -> None:
        """All that may be drawn goes with the model and the data. Raises UsageError or DataError, naming the method."""
        for name, method in self.spec.methods.items():
            for params in corners({key: r for key, r in method.ranges.items() if key in FITTED}, MOST):
                try:
                    self._workbench(replace(method.at(params, self.folder), device=self.device)).prepare()
                except (UsageError, DataError) as error:
                    raise type(error)(f"methods: {name}: {error}") from error

    def settings(self, trial: Trial, out: Path) -> ForgetSettings:
        """What `forget` is to be told to make this trial's adapter in `out`, with the shared importance."""
        settings = replace(self.spec.methods[trial.method].at(trial.params, out), device=self.device)
        bench = self._workbench(settings)
        if bench.measures_importance and not settings.importance:
            settings = replace(settings, importance=str(self._importance(bench).absolute()))
        return replace(settings, **ignored(settings))  # what all methods share may be for some of them

    def run(self, trial: Trial) -> tuple[dict[str, Any], float]:
        """(result, what is minimised) of a trial. What an interrupted one had finished is used when it is run again.

        One that cannot be run to its end is stopped as well: it would fail again, for whoever took it up.
        """
        began = time.perf_counter()
        level, floor = self.measure.original["level"], self.spec.utility_floor
        attached: list[lora.PeftModel] = []
        try:
            result = self._result(trial, attached)
            value = objective(result["scores"], level, floor)
        except (Broken, NumericError, UsageError, ResourceError, MemoryError, RuntimeError) as error:
            scarce = is_out_of_memory(error)
            if isinstance(error, RuntimeError) and not scarce:
                raise
            if not attached:
                self.bench.release_model()  # a part of an adapter may be on it
            result = {"state": STOPPED, "reason": "out of memory" if scarce else str(error)}
            value = 1 + floor - getattr(error, "share", 0.0)
        finally:
            for wrapped in attached:
                wrapped.unload()
        return result | {"seconds": round(time.perf_counter() - began, 3)}, value

    def _result(self, trial: Trial, attached: list[lora.PeftModel]) -> dict[str, Any]:
        """The scores of a trial that ends well; `attached`: see `_watch`."""
        run = self.folder / LOCKS / trial.name
        run.mkdir(mode=0o700, exist_ok=True)
        artifacts.remove_unfinished(run)
        artifacts.write_json(run / artifacts.IDENTITY, {"run": json.dumps(asdict(trial)), "changed": []})
        bench = self._workbench(self.settings(trial, run))
        pipeline.write_inputs(bench, run)
        model = train_adapter(bench, run, pipeline.started(bench, run), self._watch(bench, attached))
        model = lora.scaled(model, bench.settings.export_scale)
        scores = self.measure.scores(model, self.measure.sets)
        intervals = {name: [score["low"], score["high"]] for name, score in scores.items()}
        return {"state": COMPLETE, "scores": self.measure.values(scores), "intervals": intervals}

    def _workbench(self, settings: ForgetSettings) -> Workbench:
        bench = Workbench(settings)
        bench.borrow(self.bench)
        return bench

    def _importance(self, bench: Workbench) -> Path:
        """A folder with the importance that these settings want, measured unless it has been; one at a time."""
        about = [bench.about(), asdict(bench.probe), [site.name for site in bench.sites], bench.settings.compat]
        about += [bench.score] if bench.settings.compat else []  # else what is stored serves every score
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / IMPORTANCE / key
        with queued(path):
            if not path.is_dir():
                for left in path.parent.glob(f".{key}.partial-*"):  # by a worker that was killed
                    shutil.rmtree(left)
                with artifacts.sealed_folder(path) as folder:
                    measure_importance(bench, folder)
        return path

    def _watch(self, bench: Workbench, attached: list[lora.PeftModel]) -> Callable[[lora.PeftModel], Utility]:
        """Notes the model that training makes, and has its utility measured after every epoch."""
        every = math.ceil(len(bench.data[0].examples) / bench.settings.batch_size)
        floor, start, last = self.spec.utility_floor, self.measure.original["watched"], every * bench.settings.epochs

        def watch(wrapped: lora.PeftModel) -> Utility:
            attached.append(wrapped)
            return Floor(lambda: self.measure.utility(wrapped), every, floor, start, [[0, 1.0]], last)

        return watch
