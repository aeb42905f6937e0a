"""Locks between processes, for files that only one may write. A lock ends with its process."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

# filelock is imported late, because `mixchat --help` takes no lock.

LOCK_SUFFIX = ".mixchat.lock"
_POLL_S = 0.02  # between two attempts to take a lock
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Busy(Exception):
    """Another process holds the lock."""


@contextmanager
def exclusive_lock(target: Path, *, on_wait: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the exclusive right to write `target`, by a lock file next to it.

    If another process holds it, `on_wait` is called, and this one waits. Raises `Busy` in place of
    that without `on_wait`, and `OSError`.
    """
    # No model, chat or file of mixchat begins with a dot.
    path = target.parent / f".{target.name}{LOCK_SUFFIX}"
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_file(path, remove=True))
        except Busy:
            if on_wait is None:
                raise
            on_wait()
            stack.enter_context(lock_file(path, timeout=math.inf, remove=True))
        yield


@contextmanager
def lock_file(path: Path, *, timeout: float = 0, remove: bool = False) -> Iterator[None]:
    """Hold the lock of the lock file `path`, which is created, and removed with `remove`.

    Raises `Busy` after `timeout` seconds, and `OSError`. A file system without locks excludes
    nobody.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    # The group may write it, because users may share a cache.
    # A soft lock is a file that a killed process leaves behind.
    lock = FileLock(path, mode=0o664, fallback_to_soft=False)
    # With a timeout, because a suspended process holds its lock for as long as it is suspended.
    try:
        lock.acquire(timeout=timeout, poll_interval=_POLL_S)
    except Timeout:
        raise Busy from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        if remove:
            with suppress(OSError):  # a file that is left locks nothing
                path.unlink()
        lock.release()


def lock_open_file(descriptor: int) -> bool:
    """Lock an open file until it is closed. Return False if another process has the lock."""
    from filelock import lock_descriptor

    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
