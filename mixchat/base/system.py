"""All that differs between Linux and macOS, and what several rooms ask of a terminal.

Other modules do not ask which system runs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

DIRECT: int = getattr(os, "O_DIRECT", 0)  # of `os.open`, which macOS lacks
_USUAL_FILES = 64  # that a process with a model has open
_OPEN_S, _OPEN_AGAIN_S = 3.0, 0.05  # for a file, if strangers have all descriptors
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # of renameat2 and of renamex_np
_START_TICKS = 19  # the place of a process's start in Linux's stat, after its name
_open_files_lock = threading.Lock()


def drops_pages() -> bool:
    """Return whether the page cache can drop a file's pages, as macOS's cannot."""
    return sys.platform != "darwin"


def advise(descriptor: int, start: int, size: int, *, needed: bool) -> None:
    """Let Linux's page cache read a part of a file soon, or drop it. 0 bytes mean the rest."""
    if sys.platform != "darwin":
        advice = os.POSIX_FADV_WILLNEED if needed else os.POSIX_FADV_DONTNEED
        os.posix_fadvise(descriptor, start, size, advice)


def set_direct(descriptor: int, direct: bool) -> None:
    """Read and write an open file past the page cache, or through it.

    Raises `OSError` if that is not possible.
    """
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, int(direct))
    else:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        flags = flags | DIRECT if direct else flags & ~DIRECT
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two directories in one step. Return False if that is impossible."""
    import ctypes

    library = ctypes.CDLL(None)
    names = (os.fsencode(one), os.fsencode(other))
    try:
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, _RENAME_SWAP) == 0)
        at = ctypes.c_int(_AT_FDCWD)
        return bool(library.renameat2(at, names[0], at, names[1], _RENAME_EXCHANGE) == 0)
    except AttributeError:  # an old musl has no renameat2
        return False


def allow_open_files(count: int) -> None:
    """Raise the limit of open files to `count`, or as far as the system lets it.

    macOS refuses more than a limit of its own.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_files_limit() -> int:
    """Return how many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def hold_back_open_files(count: int) -> None:
    """Reserve `count` descriptors for `open_file`, at most a quarter of all.

    The soft limit is lowered below the hard one, so only `open_file` gets the difference.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return
    most = hard - min(count, hard // 4)
    if soft == resource.RLIM_INFINITY or soft > most:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_file(path: Path, flags: int, mode: int = 0o777) -> int:
    """Open a file as `os.open` does, also one of those that `hold_back_open_files` keeps.

    A connection may take one of them at that moment, until it has failed to prove its key.
    """
    latest = time.monotonic() + _OPEN_S
    try:
        return os.open(path, flags, mode)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    while True:
        # One thread at a time raises the limit, and only for the moment of opening.
        with _open_files_lock:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            try:
                return os.open(path, flags, mode)
            except OSError as error:
                holds_back = soft != hard
                if error.errno != errno.EMFILE or not holds_back or time.monotonic() > latest:
                    raise
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        time.sleep(_OPEN_AGAIN_S)


def open_files_left() -> int | None:
    """Return how many more files this process may open, or None if nothing limits them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return None
    try:
        return max(0, int(soft) - len(os.listdir("/dev/fd")))
    except OSError:  # a sandbox without /proc
        return max(0, int(soft) - _USUAL_FILES)


def process_seconds() -> float:
    """Return the seconds since this process was started, 0 if the system does not tell."""
    import psutil

    try:
        if sys.platform == "darwin":
            return max(time.time() - float(psutil.Process().create_time()), 0.0)
        # psutil adds the time of the boot, which Linux tells in whole seconds.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
    except (OSError, psutil.Error):  # a sandbox without /proc
        return 0.0


def terminal_mode(source: Any) -> list[Any] | None:
    """Return the mode of the terminal that `source` reads, or None."""
    with suppress(AttributeError, OSError, ValueError, NotImplementedError, termios.error):
        return termios.tcgetattr(source.fileno())
    return None


def set_terminal_mode(source: Any, mode: list[Any]) -> None:
    """Set what `terminal_mode` has returned, if the terminal is still there."""
    with suppress(AttributeError, OSError, ValueError, termios.error):
        termios.tcsetattr(source.fileno(), termios.TCSANOW, mode)
