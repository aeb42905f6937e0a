"""One process at a time for each model: a lock that the system takes back from the dead."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_POLL = 0.2  # seconds


class Busy(Exception):
    """Another process holds the lock."""


@contextmanager
def only_one(target: Path, *, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the right to write the directory `target`, by a lock file beside it.

    Where another process has it, `wait` is called once and then this one waits its turn; without
    `wait` it raises `Busy`. The file is removed at the end.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.lock"  # no model's name begins with a dot
    if (fd := _try(path)) is None:
        if wait is None:
            raise Busy
        wait()
        while (fd := _try(path)) is None:
            time.sleep(_POLL)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _try(path: Path) -> int | None:
    """The open lock file, locked; None where another process has it, now or by a hair's breadth."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    # Whoever held it before may have removed the file meanwhile: then this is a lock on nothing.
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
    os.close(fd)
    return None
