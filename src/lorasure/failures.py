"""What a command that failed says, on one line, and the exit code that it ends with."""

from __future__ import annotations

import os
import signal
import traceback
from pathlib import Path

from . import __version__
from .errors import (
    ANEW,
    GOES_ON,
    INTERRUPTED,
    KEPT,
    KEPT_TO_CHANGE,
    LorasureError,
    ResourceError,
    is_out_of_memory,
)
from .interrupt import Terminated

HERE = Path(__file__).parent
NOTHING = "Nothing was written."
MISTAKE = 70  # exit code
TRACEBACK = "LORASURE_TRACEBACK"  # set in the environment, all of a mistake of ours is shown


def explained(error: BaseException) -> tuple[str, int]:
    """(line for the user, exit code) of whatever a command raised."""
    notes = getattr(error, "__notes__", ())  # only ours: those of a library may quote a row
    left = next((note for note in (ANEW, GOES_ON, KEPT, KEPT_TO_CHANGE) if note in notes), "")
    if isinstance(error, LorasureError):
        said = str(error) if str(error).endswith((".", "?", "!")) else f"{error}."
        return f"{said} {left}", error.exit_code
    if isinstance(error, OSError) and error.errno is not None:  # without one it comes from a library: a mistake of ours
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or type(error).__name__}{where}. {left or NOTHING}", ResourceError.exit_code
    if isinstance(error, KeyboardInterrupt):
        stopped = 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
        return f"interrupted. {left or NOTHING}", INTERRUPTED if left not in ("", ANEW) else stopped
    if is_out_of_memory(error):
        return f"out of memory. {left}", ResourceError.exit_code
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    hint = f"{TRACEBACK}=1 shows all of it, which may quote your rows."
    return f"a mistake of ours: {type(error).__name__} at {_where(error)}. {left} {hint}", MISTAKE


def _where(error: BaseException) -> str:
    """The last line of ours that it passed. Not its message: that of a library may quote a row."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(HERE)][-1]
    return f"{Path(own.filename).relative_to(HERE)}:{own.lineno}, version {__version__}"
