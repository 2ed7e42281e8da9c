"""Errors that a user can meet, each with the exit code the command line ends with.

Messages name the input (file, row or flag), the value and the choices, in one line, and never quote forget text.
"""

INTERRUPTED = 75  # exit code of a command that a signal stopped and that --resume continues
KEPT = "What was finished is kept: the same command with --resume continues."  # a note on the error of such a command
# Of one that would fail again at the same place.
KEPT_TO_CHANGE = "What was finished is kept: --resume continues with another setting (--lr 1e-4 --allow-change lr)."
GOES_ON = "What was finished is kept: the same command continues."  # of one that needs no flag for it
ANEW = "It cannot be resumed: the same command starts anew."  # of one that leaves something all the same


class LorasureError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(LorasureError, ValueError):
    """A wrong flag, setting or argument."""

    exit_code = 2


class DataError(LorasureError, ValueError):
    """A file, row or model folder that cannot be used."""

    exit_code = 3


class NumericError(LorasureError, ArithmeticError):
    """A non-finite value, or a result that fails its own check."""

    exit_code = 4


class ResourceError(LorasureError):
    """Not enough memory, disk or permission."""

    exit_code = 5


# How torch on a CPU and the libraries underneath it on a GPU say it, who have no class of their own for that.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. torch's own is known by its name: it is loaded only when used."""
    own = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return own or any(text in str(error) for text in OUT_OF_MEMORY)


SHOWN = 2000  # characters of a message: enough for every one of ours, too few for a file that got into one


def escaped(text: str) -> str:
    """Text with every control character, line break, surrogate and mark of writing direction as a backslash escape.

    Names of files, columns and settings come from elsewhere. Left as they are, they could move the cursor, repaint what
    is above, run from right to left, or look like a message of ours.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(message: str) -> str:
    """A message on one line, escaped, and cut in the middle if endless."""
    line = " ".join(message.split())
    if len(line) > SHOWN:
        line = f"{line[: SHOWN // 2]} [...] {line[-SHOWN // 2 :]}"
    return escaped(line)
