"""One process at a time on a folder, by a lock that ends with its process; and what such an end may leave behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .artifacts import IDENTITY, MANIFEST, is_unfinished
from .errors import ResourceError

PAUSE = 0.1  # seconds between two looks at a lock that another process holds


def beside(out: Path, what: str) -> Path:
    """A hidden name next to a folder: `.NAME.what`."""
    return out.parent / f".{out.name}.{what}"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Nobody else works on the folder `out` meanwhile; also puts right what a process killed while renaming left.

    The lock is the kernel's, on a file beside the folder, so it ends with the process whatever happens to it.
    """
    path = beside(out, "lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break  # else its holder has just removed it: what we hold is a lock on nothing
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise ResourceError(f"{out}: another process is working on this folder.") from error
        os.close(descriptor)
    try:
        _settle(out)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def queued(out: Path) -> Iterator[None]:
    """`locked`, but waits until nobody else works on the folder."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(locked(out))
                break
            except ResourceError:
                time.sleep(PAUSE)
        yield


def recover(out: Path) -> None:
    """Bring back a folder whose replacement was killed between two renames. To be called before one is only read."""
    if beside(out.resolve(), "old").exists():
        with locked(out.resolve()):
            pass


def is_ours(folder: Path) -> bool:
    """Whether a hidden folder may go: empty, but for what was being written, or with what only this program writes."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    marked = any((folder / name).is_file() for name in (MANIFEST, IDENTITY))
    return marked or all(is_unfinished(Path(path.name)) for path in folder.iterdir())


def discard(folder: Path) -> None:
    """Remove a folder, as far as that is possible; its manifest last, which says to the end whose it is."""
    with suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.rmdir()


def _settle(out: Path) -> None:
    old = beside(out, "old")
    if not is_ours(old):
        return
    if out.exists():
        discard(old)
    else:  # killed between the two renames of `_swap`
        old.rename(out)
