"""One process at a time for what must not be written twice: a lock that dies with its process."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOOK = 0.02  # seconds between two looks whether the lock is free
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Busy(Exception):
    """Another process holds the lock."""


@contextmanager
def only_one(
    target: Path, *, wait: Callable[[], object] | None = None, patience: float = math.inf
) -> Iterator[None]:
    """Hold the right to write `target`, a file or a directory, by a lock file beside it.

    Where another process has it, `wait` is called once and then this one waits its turn, for as
    many seconds as it has `patience`; then, or without `wait`, it raises `Busy`. The file is
    removed at the end. A disk that has no locks, as some network disks, excludes nobody. Raises
    `OSError`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.lock"  # nothing of ours begins with a dot
    if (fd := _try(path)) is None:
        if wait is None:
            raise Busy
        wait()
        deadline = time.monotonic() + patience
        while (fd := _try(path)) is None:
            if time.monotonic() > deadline:
                raise Busy
            time.sleep(_LOOK)
    try:
        yield
    finally:
        with suppress(OSError):  # one that is left locks nothing
            path.unlink()
        os.close(fd)


def _try(path: Path) -> int | None:
    """The open lock file, locked; None where another process has it, or had it until now."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags, 0o644)
    try:
        if _locked(fd) and _is_at(fd, path):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Whoever held the lock before may have removed its file: then this is a lock on nothing."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False
