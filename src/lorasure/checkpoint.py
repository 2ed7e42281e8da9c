"""Training that can be continued: checkpoints, the log that goes with them, and the best state by what is kept."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import artifacts
from .errors import DataError
from .level import Level
from .train import Training

FOLDER = "checkpoints"
STATE = "state.json"
TENSORS = "state.safetensors"
KEPT = 2  # the newest, and one more for the day on which that one is damaged
SECONDS_APART = 60.0
TIME_SHARE = 0.02  # of the time that may go into checkpoints when their distance is left to us


@dataclass
class Utility:
    """How much of what must stay is still there: `measure()` is a score, higher is better, taken every `every` steps.

    `floor`: the least share of its value at the start. `shares`: [step, share of the start] of each measurement.
    """

    measure: Callable[[], float]
    every: int
    floor: float
    start: float = 0.0
    shares: list[list[float]] = field(default_factory=list)

    def take(self, step: int) -> bool:
        """Measure at a step; whether the state is good enough."""
        value = self.measure()
        self.start = self.start or value
        self.shares.append([step, value / self.start])
        return self.shares[-1][1] >= self.floor

    @property
    def good(self) -> list[int]:
        """Steps, other than the start, at which enough was kept."""
        return [int(step) for step, share in self.shares if step and share >= self.floor]


@dataclass
class Keeper:
    """What `fit` writes into a run folder: `train.jsonl`, a line per step, and `checkpoints/step-000123`.

    A checkpoint holds the tensors and numbers of `Training`, the log until there, and its own manifest; the newest two
    stay. `every`: steps from one to the next; 0: only when interrupted; None: a minute, or longer where that would cost
    more than 2 % of the time. `utility`: at the end the parameters are those of the last state that was good enough.
    `level`: when forgetting rests.
    """

    run: Path
    every: int | None
    note: Callable[[str], None]
    utility: Utility | None = None
    level: Level | None = None
    lines: list[str] = field(default_factory=list)
    continued: int = 0
    saved: float = field(default_factory=time.monotonic)
    cost: float = 0.0

    def begin(self, training: Training) -> None:
        """Continue from the newest checkpoint that is whole; the log is cut to it."""
        for path in sorted((self.run / FOLDER).glob("step-*"), reverse=True):
            if bad := self._restore(path, training):
                self.note(f"{path}: damaged ({bad}); going back to the one before.")
                shutil.rmtree(path)
                continue
            self.continued = training.done
            self.note(f"train: continuing after step {training.done}.")
            break
        artifacts.write_text(self.run / artifacts.LOG, "".join(self.lines))
        if self.utility and not self.utility.shares:
            self.utility.take(0)

    def after_step(self, training: Training, record: dict[str, Any], *, stopping: bool) -> None:
        """Log the step, see what is kept at the end of an epoch, and write a checkpoint when one is due."""
        if self.level:
            record |= {"forget_weight": self.level.weights["forget"]}
        self.lines.append(json.dumps(record, allow_nan=False) + "\n")
        with (self.run / artifacts.LOG).open("a", encoding="utf-8") as log:
            log.write(self.lines[-1])
        if self.utility and training.done % self.utility.every == 0 and self.utility.take(training.done):
            training.best = {name: p.detach().clone() for name, p in training.parameters.items()}
        if self.level:
            self.level.after_step(training.done)
        if stopping or self._due(training.done):
            self.save(training)

    @torch.no_grad()
    def finish(self, training: Training) -> None:
        """Put the last parameters back that were good enough, if these were not the last of all."""
        if self.utility and self.utility.good and self.utility.good[-1] != training.done:
            for name, p in training.parameters.items():
                p.copy_(training.best[name])

    def save(self, training: Training) -> None:
        """Write a checkpoint and remove all but the newest."""
        began = time.monotonic()
        path = self.run / FOLDER / f"step-{training.done:06d}"
        with artifacts.sealed_folder(path) as folder:
            artifacts.write_tensors(folder / TENSORS, training.tensors(), {})
            artifacts.write_text(folder / artifacts.LOG, "".join(self.lines))
            numbers = training.numbers() | {"run": self._run_id()}
            if self.utility:
                numbers |= {"start": self.utility.start, "shares": self.utility.shares}
            if self.level:
                numbers |= {"seen": self.level.seen}
            artifacts.write_json(folder / STATE, numbers)
        for old in sorted((self.run / FOLDER).glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)
        self.saved = time.monotonic()
        self.cost = self.saved - began

    def _due(self, step: int) -> bool:
        if self.every is None:
            return time.monotonic() - self.saved > max(SECONDS_APART, self.cost / TIME_SHARE)
        return self.every > 0 and step % self.every == 0

    def _run_id(self) -> str:
        with artifacts.as_written(self.run / artifacts.IDENTITY):
            return artifacts.read_json(self.run / artifacts.IDENTITY)["run"]

    def _restore(self, path: Path, training: Training) -> str:
        """Continue from one checkpoint; or what is wrong with it, and then nothing has changed."""
        try:
            if bad := artifacts.differences(path):
                return ", ".join(bad)
            numbers = artifacts.read_json(path / STATE)
            tensors, _ = artifacts.read_tensors(path / TENSORS)
            with artifacts.as_written(path):
                lines = (path / artifacts.LOG).read_text(encoding="utf-8").splitlines(keepends=True)
                if numbers["run"] != self._run_id():
                    return "it is another run's"
                seen = list(numbers["seen"]) if self.level else []
                kept = (float(numbers["start"]), list(numbers["shares"])) if self.utility else None
                training.restore(tensors, numbers)
        except (DataError, RuntimeError) as error:
            return str(error)
        self.lines = lines
        if self.utility and kept:
            self.utility.start, self.utility.shares = kept
        if self.level:
            self.level.restore(seen)
        return ""


def remove_checkpoints(run: Path) -> None:
    """Once training is over, what is finished is in `trained.safetensors`."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
