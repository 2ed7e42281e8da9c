"""Training that can be continued: checkpoints, the log that goes with them, and the best state by what is kept."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
    `best`: the step of the last state that was good enough, other than the start, and is held; 0: none. `rows_sha256`:
    of what is measured, where that may change from one attempt to the next.
    """

    measure: Callable[[], float]
    every: int
    floor: float
    start: float = 0.0
    shares: list[list[float]] = field(default_factory=list)
    best: int = field(default=0, kw_only=True)
    rows_sha256: str = field(default="", kw_only=True)

    def take(self, step: int) -> bool:
        """Measure at a step; whether the state is good enough."""
        value = self.measure()
        self.start = self.start or value
        self.shares.append([step, value / self.start])
        return self.shares[-1][1] >= self.floor

    def numbers(self) -> dict[str, Any]:
        """What `continued` takes from a checkpoint."""
        return {name: getattr(self, name) for name in ("start", "shares", "best", "rows_sha256")}

    def continued(self, numbers: Mapping[str, Any]) -> Utility:
        """As it was when a checkpoint's numbers were taken, if they say so. A state below today's floor is not held.

        Shares of other rows say nothing of these, so neither they nor the state chosen by them are taken over.
        """
        if "shares" not in numbers or numbers.get("rows_sha256", self.rows_sha256) != self.rows_sha256:
            return self
        shares, best = [[int(step), float(share)] for step, share in numbers["shares"]], int(numbers["best"])
        enough = any(step == best and share >= self.floor for step, share in shares)
        return replace(self, start=float(numbers["start"]), shares=shares, best=best if enough else 0)


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
        """Continue from the newest checkpoint that is whole and fits; the log is cut to it. A damaged one goes."""
        if self.utility and not self.utility.shares:
            self.utility.take(0)  # now: a checkpoint does not know what was asked for later
        for path in sorted((self.run / FOLDER).glob("step-*"), reverse=True):
            if damaged := _damage(path):
                self.note(f"{path}: damaged ({damaged}); going back to the one before.")
                shutil.rmtree(path)
            elif unfit := self._restore(path, training):
                self.note(f"{path}: does not fit ({unfit}); it stays, going back to the one before.")
            else:
                self.continued = training.done
                self.note(f"train: continuing after step {training.done}.")
                break
        artifacts.write_text(self.run / artifacts.LOG, "".join(self.lines))

    def after_step(self, training: Training, record: dict[str, Any]) -> None:
        """Log the step, and see what is kept at the end of an epoch."""
        if self.level:
            record |= {"forget_weight": self.level.weights["forget"]}
        self.lines.append(json.dumps(record, allow_nan=False) + "\n")
        with (self.run / artifacts.LOG).open("a", encoding="utf-8") as log:
            log.write(self.lines[-1])
        if self.utility and training.done % self.utility.every == 0 and self.utility.take(training.done):
            training.best = {name: p.detach().clone() for name, p in training.parameters.items()}
            self.utility.best = training.done
        if self.level:
            self.level.after_step(training.done)

    @torch.no_grad()
    def finish(self, training: Training) -> None:
        """Put the last parameters back that were good enough, if these were not the last of all."""
        if self.utility and self.utility.best not in (0, training.done):
            for name, p in training.parameters.items():
                p.copy_(training.best[name])

    def save(self, training: Training) -> None:
        """Write a checkpoint and remove all but the newest of those until here."""
        began = time.monotonic()
        path = self.run / FOLDER / f"step-{training.done:06d}"
        shutil.rmtree(path, ignore_errors=True)  # one that did not fit
        with artifacts.sealed_folder(path) as folder:
            artifacts.write_tensors(folder / TENSORS, training.tensors(), {})
            artifacts.write_text(folder / artifacts.LOG, "".join(self.lines))
            numbers = training.numbers() | {"run": self._run_id()}
            if self.utility:
                numbers |= self.utility.numbers()
            if self.level:
                numbers |= {"seen": self.level.seen}
            artifacts.write_json(folder / STATE, numbers)
        for old in sorted(p for p in path.parent.glob("step-*") if p.name <= path.name)[:-KEPT]:
            shutil.rmtree(old)
        self.saved = time.monotonic()
        self.cost = self.saved - began

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint."""
        if self.every is None:
            return time.monotonic() - self.saved > max(SECONDS_APART, self.cost / TIME_SHARE)
        return self.every > 0 and step % self.every == 0

    def _run_id(self) -> str:
        with artifacts.as_written(self.run / artifacts.IDENTITY):
            return artifacts.read_json(self.run / artifacts.IDENTITY)["run"]

    def _restore(self, path: Path, training: Training) -> str:
        """Continue from a checkpoint that is whole; or why it does not fit, and then nothing has changed.

        What it does not hold was not asked for when it was written, and begins now.
        """
        try:
            numbers = artifacts.read_json(path / STATE)
            tensors, _ = artifacts.read_tensors(path / TENSORS)
            with artifacts.as_written(path):
                lines = (path / artifacts.LOG).read_text(encoding="utf-8").splitlines(keepends=True)
                if numbers["run"] != self._run_id():
                    return "it is another run's"
                seen = [[int(step), float(nll)] for step, nll in numbers.get("seen", ())]
                utility = self.utility and self.utility.continued(numbers)
                training.restore(tensors, numbers)
        except (DataError, RuntimeError) as error:
            return str(error)
        self.lines, self.utility = lines, utility
        if self.level:
            self.level.restore(seen)
        return ""


def _damage(path: Path) -> str:
    """What is not as a checkpoint's manifest says; nothing if it is whole."""
    try:
        return ", ".join(artifacts.differences(path))
    except DataError as error:
        return str(error)


def remove_checkpoints(run: Path) -> None:
    """Once training is over, what is finished is in `trained.safetensors`."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
