"""What a person sees while a run works: a bar per stage with its rate and the time left, then a line that stays."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from .errors import escaped

EVERY = 60  # seconds between the lines of a stage where there is no terminal, and so no bar: in a batch job's log


class RateColumn(ProgressColumn):
    """Rows or steps per second."""

    def render(self, task: Task) -> Text:
        """The mean rate so far."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {task.fields['unit']}/s", style="progress.data.speed")


class Reporter:
    """Times stages and shows them on standard error; standard output is left to results. `quiet` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.seconds: dict[str, float] = {}
        self.keep: Callable[[dict[str, float]], object] | None = None
        self.waiting: list[str] | None = None

    def of_own(self) -> Reporter:
        """One that shows the same and has timed nothing yet."""
        other = copy(self)
        other.seconds, other.keep = {}, None
        return other

    def go_on(self, earlier: Mapping[str, float], keep: Callable[[dict[str, float]], object]) -> None:
        """Add the seconds of an `earlier` part of the same work; `keep` gets all, now and after every stage."""
        for name, took in earlier.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + took
        self.keep = keep
        keep(self.seconds)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "rows") -> Iterator[Callable[[int], None]]:
        """Time a stage; within it, call the yielded function with the number of units done. Same name: times add up.

        One that an error ends counts as well; time of a stage within it counts there.
        """
        began, apart = time.perf_counter(), sum(self.seconds.values())
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            RateColumn(),
            TimeRemainingColumn(),
        )
        live = self.console.is_terminal and not self.console.quiet
        bar = Progress(*columns, console=self.console, transient=True, disable=not live)
        with bar if live else nullcontext():
            task, said = bar.add_task(name, total=total, unit=unit), began

            def advance(done: int) -> None:
                nonlocal said
                bar.advance(task, done)
                if not live and time.perf_counter() - said > EVERY:
                    said = time.perf_counter()
                    self.note(f"{name:<12} {bar.tasks[task].completed:.0f} of {total} {unit}")

            try:
                yield advance
            finally:
                took = time.perf_counter() - began
                within = sum(self.seconds.values()) - apart
                self.seconds[name] = self.seconds.get(name, 0.0) + took - within
                if self.keep:
                    self.keep(self.seconds)
        amount = f"{total} {unit} in {took:.1f} s ({total / took:.0f} {unit}/s)" if total else f"{took:.1f} s"
        self.note(f"{name:<12} {amount}")

    def note(self, text: str) -> None:
        """One line that stays. Neither markup nor control characters in it are interpreted."""
        if self.waiting is None:
            self.console.print(escaped(text), markup=False, emoji=False, soft_wrap=True)
        else:
            self.waiting.append(text)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Print the lines of the block only when it ends well, so that an error in it stands alone."""
        if self.waiting is not None:  # within another block, which decides
            yield
            return
        self.waiting = []
        try:
            yield
        except BaseException:
            self.waiting = None
            raise
        lines, self.waiting = self.waiting, None
        for line in lines:
            self.note(line)


def peak_memory() -> dict[str, int]:
    """Largest resident memory of this process so far, and of the GPU's allocator if there is one, in bytes."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak
