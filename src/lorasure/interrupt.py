"""Signals: SIGTERM unwinds like Ctrl-C, and training finishes its step first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM, made to unwind like SIGINT."""


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Within the block SIGTERM raises Terminated, so that everything is cleaned up as after Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    with _handled({signal.SIGTERM: stop}):
        yield


@contextmanager
def finishing_first() -> Iterator[Callable[[], KeyboardInterrupt | None]]:
    """Within the block the first SIGTERM or SIGINT is only noted, for the yielded function to tell; a second raises.

    One that is noted is raised at the end of the block, also in place of an error in it.
    """
    noted: list[KeyboardInterrupt] = []

    def stop(number: int, frame: object) -> None:
        error = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if noted:
            raise error
        noted.append(error)

    with _handled({signal.SIGTERM: stop, signal.SIGINT: stop}):
        try:
            yield lambda: noted[0] if noted else None
        except Exception as error:  # who handles that would go on
            if noted:
                raise noted[0] from error
            raise
    if noted:
        raise noted[0]


@contextmanager
def _handled(handlers: dict[signal.Signals, Callable[[int, object], None]]) -> Iterator[None]:
    """The handlers, while the block runs. Python allows that in the main thread alone; elsewhere nothing changes."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
