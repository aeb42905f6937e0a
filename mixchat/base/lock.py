"""A lock between processes, for files that only one may write; it ends with its process."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_INTERVAL = 0.02  # seconds between two attempts to take the lock
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Busy(Exception):
    """Another process holds the lock."""


@contextmanager
def exclusive_lock(
    target: Path, *, on_wait: Callable[[], object] | None = None, timeout: float = math.inf
) -> Iterator[None]:
    """Hold the exclusive right to write `target`, a file or a directory, by a lock file beside it.

    Where another process holds it, `on_wait` is called once, and this one waits for `timeout`
    seconds. Raises `Busy` after that, or at once without `on_wait`, and `OSError`. The lock file is
    removed at the end. A file system without locks, as some on networks, excludes nobody.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # No model, chat or file of mixchat begins with a dot.
    path = target.parent / f".{target.name}.lock"
    if (fd := _try(path)) is None:
        if on_wait is None:
            raise Busy
        on_wait()
        deadline = time.monotonic() + timeout
        while (fd := _try(path)) is None:
            if time.monotonic() > deadline:
                raise Busy
            time.sleep(_INTERVAL)
    try:
        yield
    finally:
        with suppress(OSError):  # a file that is left locks nothing
            path.unlink()
        os.close(fd)


def _try(path: Path) -> int | None:
    """Return the open lock file, locked; None where another process holds or just removed it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags, 0o644)
    try:
        if lock_open_file(fd) and _is_at(fd, path):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def lock_open_file(fd: int) -> bool:
    """Lock an open file until it is closed; return False where another process holds the lock.

    For a file that is never replaced by another one: it needs no lock file beside it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Return whether `fd` is the file at `path`: who held the lock before may have removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False
