"""The trials of a search in one journal that processes and machines share (optuna): who runs which, none twice.

A trial is one of optuna's, number i of the study of its method, so that there are never more than were asked for.
Whoever runs it holds a lock that ends with the process: a trial under way whose lock is free lost its worker, and the
next one who comes takes it up with the same parameters.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ResourceError, UsageError
from ..lock import locked, queued
from .spec import Range, Spec

JOURNAL = "study.journal"
LOCKS = "trials"  # the folder that holds them, and what a trial keeps while it runs
STOPPED = "stopped"
RUNNING = "running"


def need_optuna() -> Any:
    """The library, or a UsageError that says how to get it."""
    try:
        import optuna
    except ImportError as error:
        raise UsageError("lorasure search needs optuna: pip install 'lorasure[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class Trial:
    """What to run: trial `index` (from 0) of a method, with these parameters."""

    method: str
    index: int
    params: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-{self.index:04d}"


class Study:
    """All trials of a search in `folder`."""

    def __init__(self, folder: Path, spec: Spec) -> None:
        optuna = need_optuna()
        self.optuna, self.folder, self.spec = optuna, folder, spec
        self.journal = folder / JOURNAL
        with queued(self.journal):
            _mend(self.journal)
        backend = optuna.storages.journal.JournalFileBackend(str(self.journal), lock_obj=_Turn(self.journal))
        self.storage = optuna.storages.JournalStorage(backend)
        with self._alone():
            options = {"storage": self.storage, "load_if_exists": True}
            self.studies = {name: optuna.create_study(study_name=name, **options) for name in spec.methods}

    def _alone(self) -> Any:
        """Within the context nobody else hands out trials."""
        return queued(self.folder / LOCKS)

    @contextmanager
    def next_trial(self) -> Iterator[Trial | None]:
        """A trial that nobody runs, locked within the block; None: all are finished or somebody else's."""
        with ExitStack() as held:
            with self._alone():
                found = next((t for t in self._unfinished() if self._take(held, t)), None)
                if found and found.index == len(self._trials(found.method)):
                    space = {key: self._distribution(r) for key, r in self.spec.methods[found.method].ranges.items()}
                    running = self.optuna.trial.TrialState.RUNNING
                    new = self.optuna.trial.create_trial(state=running, params=found.params, distributions=space)
                    self.studies[found.method].add_trial(new)
            yield found

    def finish(self, trial: Trial, result: dict[str, Any], value: float) -> None:
        """Put down what came of a trial: its `result`, whose `state` is COMPLETE or STOPPED, and what is minimised.

        To optuna a stopped one is complete as well: of those it calls pruned, its samplers do not look at the value.
        """
        with self._alone():
            number = self._trials(trial.method)[trial.index]._trial_id
            self.storage.set_trial_user_attr(number, "result", result)
            self.storage.set_trial_state_values(number, self.optuna.trial.TrialState.COMPLETE, [value])

    def lines(self) -> list[dict[str, Any]]:
        """Every trial so far, method by method: method, trial, params, state, and its result."""
        return [
            {"method": method, "trial": t.number, "params": t.params, "state": RUNNING} | t.user_attrs.get("result", {})
            for method in self.studies
            for t in self._trials(method)
        ]

    @property
    def finished(self) -> bool:
        """Whether every trial is."""
        return sum("result" in t.user_attrs for m in self.studies for t in self._trials(m)) == self.total

    @property
    def total(self) -> int:
        """How many there will have been."""
        return self.spec.trials * len(self.studies)

    def _trials(self, method: str) -> list[Any]:
        return self.studies[method].get_trials(deepcopy=False)

    def _unfinished(self) -> Iterator[Trial]:
        """The trials to be run, the methods in turn; parameters are drawn when a trial is new."""
        known = {method: self._trials(method) for method in self.studies}
        for index in range(self.spec.trials):
            for method, trials in known.items():
                if index < len(trials) and "result" not in trials[index].user_attrs:
                    yield Trial(method, index, trials[index].params)
                elif index == len(trials):
                    yield Trial(method, index, self._draw(method, index))

    def _take(self, held: ExitStack, trial: Trial) -> bool:
        """Lock a trial, unless somebody runs it."""
        try:
            held.enter_context(locked(self.folder / LOCKS / trial.name))
        except ResourceError:
            return False
        return True

    def _draw(self, method: str, index: int) -> dict[str, Any]:
        """Parameters of a new trial. Random ones depend on seed, method and index alone, whoever asks and when."""
        samplers = self.optuna.samplers
        digest = hashlib.sha256(f"{self.spec.seed}/{method}/{index}".encode()).digest()
        seed = int.from_bytes(digest[:4])
        sampler, past = samplers.RandomSampler(seed), []
        if self.spec.sampler == "tpe":
            # Its own default, ten random trials first, would leave a short search nothing to learn from.
            sampler = samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(3, self.spec.trials // 3)))
            past = [t for t in self._trials(method) if t.state.is_finished()]
        study = self.optuna.create_study(sampler=sampler)
        study.add_trials(past)
        space = {key: self._distribution(r) for key, r in self.spec.methods[method].ranges.items()}
        return study.ask(space).params

    def _distribution(self, wanted: Range) -> Any:
        kinds = self.optuna.distributions
        if wanted.choices:
            return kinds.CategoricalDistribution(wanted.choices)
        if isinstance(wanted.low, int) and isinstance(wanted.high, int):
            return kinds.IntDistribution(wanted.low, wanted.high, log=wanted.log)
        return kinds.FloatDistribution(wanted.low, wanted.high, log=wanted.log)


class _Turn:
    """optuna's lock on its journal, as the kernel's, which does not outlive a killed process."""

    def __init__(self, path: Path) -> None:
        self.path, self.held = path, ExitStack()

    def acquire(self) -> bool:
        self.held.enter_context(queued(self.path))
        return True

    def release(self) -> None:
        self.held.close()


def _mend(journal: Path) -> None:
    """Make a private, empty journal if there is none; cut off a last line that a dying machine left torn."""
    with open(os.open(journal, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
