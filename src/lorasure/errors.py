"""Errors that a user can meet, each with the exit code the command line ends with.

Messages name the input (file, row or flag), the value and the choices, in one line, and never quote forget text.
"""


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
