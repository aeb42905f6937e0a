"""All that differs between Linux, macOS and Windows. Other modules do not ask which system runs.

A function does nothing, or returns None, if the system lacks what it needs.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Any


def _module(name: str) -> Any:
    """Return a module that Windows lacks, or None."""
    try:
        return import_module(name)
    except ImportError:
        return None


_fcntl, _grp, _pwd, _resource, _termios = map(
    _module, ("fcntl", "grp", "pwd", "resource", "termios")
)
_os: Any = os  # with functions that other systems' type stubs lack
_signal: Any = signal

WINDOWS = sys.platform == "win32"
# Flags of `os.open`, 0 if the system lacks one. Without `BINARY` Windows changes line ends.
BINARY, NO_FOLLOW, NO_WAIT, CLOSE_ON_EXEC, DIRECT, DIRECTORY = (
    getattr(os, f"O_{name}", 0)
    for name in ("BINARY", "NOFOLLOW", "NONBLOCK", "CLOEXEC", "DIRECT", "DIRECTORY")
)
CLOSED_PIPE = (errno.EPIPE, errno.EINVAL) if WINDOWS else (errno.EPIPE,)
# The encoding of standard output and error. A file on Windows would get code page 1252.
STREAMS: dict[str, Any] = {"errors": "replace"}
if WINDOWS:
    STREAMS |= {"encoding": "utf-8", "newline": "\n"}
# The signals that end a process. Windows sends SIGBREAK when the console is closed.
ENDING = tuple(
    signal.Signals[name] for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)
OUT_OF_TIME = -getattr(signal, "SIGPROF", 0)  # the exit code after `limit_time`

_F_NOCACHE = 48  # macOS's command to keep a file out of the page cache
# Numbers of Windows: flags of a job's limits, their kind, this process, streams, and a mode.
_MAX_MEMORY, _MAX_PROCESSES, _EXTENDED_LIMITS, _THIS_PROCESS = 0x100, 0x8, 9, -1
_STDOUT, _STDERR, _CONSOLE_WITH_ESCAPES = -11, -12, 7

_position = threading.Lock()  # of open files


def read_at(descriptor: int, target: memoryview, start: int) -> int:
    """Read into `target` from offset `start` on. Return how many bytes came."""
    if hasattr(os, "preadv"):
        return int(_os.preadv(descriptor, [target], start))
    with _moved(descriptor, start), FileIO(descriptor, closefd=False) as file:
        return file.readinto(target) or 0


def write_at(descriptor: int, data: memoryview, start: int) -> int:
    """Write `data` from offset `start` on. Return how many bytes were written."""
    if hasattr(os, "pwrite"):
        return int(_os.pwrite(descriptor, data, start))
    with _moved(descriptor, start):
        return os.write(descriptor, data)


@contextmanager
def _moved(descriptor: int, start: int) -> Iterator[None]:
    """Move an open file's position in this block, which one thread at a time enters."""
    with _position:
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, start, os.SEEK_SET)
        try:
            yield
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)


def sync_directory(directory: Path) -> None:
    """Make the names of a directory's files durable. Windows cannot be asked to."""
    if WINDOWS:
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drops_pages() -> bool:
    """Return whether the page cache can drop a file's pages, as macOS's cannot."""
    return hasattr(os, "posix_fadvise")


def advise(descriptor: int, start: int, size: int, *, needed: bool) -> None:
    """Let the page cache read a part of a file soon, or drop it. 0 bytes mean the rest."""
    if drops_pages():
        advice = _os.POSIX_FADV_WILLNEED if needed else _os.POSIX_FADV_DONTNEED
        _os.posix_fadvise(descriptor, start, size, advice)


def set_direct(descriptor: int, direct: bool) -> None:
    """Read and write an open file past the page cache, or through it.

    Raises `OSError` if that is not possible.
    """
    if _fcntl is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if not drops_pages():
        _fcntl.fcntl(descriptor, _F_NOCACHE, int(direct))
        return
    flags = _fcntl.fcntl(descriptor, _fcntl.F_GETFL)
    flags = flags | DIRECT if direct else flags & ~DIRECT
    _fcntl.fcntl(descriptor, _fcntl.F_SETFL, flags)


def bytes_on_disk(status: os.stat_result) -> int:
    """Return the bytes that a file takes, without its holes if the system counts blocks."""
    blocks: int | None = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else blocks * 512


def make_private(descriptor: int) -> None:
    """Let only its owner read a file. On Windows the directory decides that."""
    if not WINDOWS:
        _os.fchmod(descriptor, 0o600)


def yield_core() -> None:
    """Let another thread that waits for this core run first."""
    if hasattr(os, "sched_yield"):
        _os.sched_yield()
    else:
        time.sleep(0)


def user_id() -> int:
    """Return the number of the user who runs this process."""
    return int(_os.geteuid()) if hasattr(os, "geteuid") else 0


def is_own_group(gid: int) -> bool:
    """Return whether a group has the user's name and no other member."""
    try:
        group, user = _grp.getgrgid(gid), _pwd.getpwuid(user_id())
    except (KeyError, AttributeError):
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and not group.gr_mem


def allow_open_files(count: int) -> None:
    """Let this process open so many files, or as many as it may."""
    if _resource is None:
        return
    soft, hard = _resource.getrlimit(_resource.RLIMIT_NOFILE)
    infinity = _resource.RLIM_INFINITY
    most = count if hard == infinity else min(count, hard)
    if soft != infinity and soft < most:
        with suppress(ValueError, OSError):
            _resource.setrlimit(_resource.RLIMIT_NOFILE, (most, hard))


def signal_main_thread(number: int) -> None:
    """Send a signal to the main thread, also if it waits in the system."""
    if hasattr(signal, "pthread_kill"):
        _signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)  # wakes the main thread on Windows


@contextmanager
def on_suspend(before: Callable[[], object], after: Callable[[], object]) -> Iterator[None]:
    """Call `before` when Ctrl-Z suspends this process, and `after` when `fg` resumes it."""
    number = getattr(signal, "SIGTSTP", None)
    if number is None:
        yield
        return

    def suspend(_: int, frame: FrameType | None) -> None:
        before()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # until `fg`
        signal.signal(number, suspend)
        after()

    previous = signal.signal(number, suspend)
    try:
        yield
    finally:
        signal.signal(number, previous)


def terminal_mode(source: Any) -> list[Any] | None:
    """Return the mode of the terminal that `source` reads, or None. Windows' console has none."""
    if _termios is not None:
        with suppress(AttributeError, OSError, ValueError, NotImplementedError, _termios.error):
            mode: list[Any] = _termios.tcgetattr(source.fileno())
            return mode
    return None


def set_terminal_mode(source: Any, mode: list[Any]) -> None:
    """Set what `terminal_mode` has returned, if the terminal is still there."""
    with suppress(AttributeError, OSError, ValueError, _termios.error):
        _termios.tcsetattr(source.fileno(), _termios.TCSANOW, mode)


def without_echo(mode: list[Any]) -> list[Any]:
    """Return a mode that shows no keys, and keeps them at Ctrl-C."""
    return [*mode[:3], mode[3] & ~_termios.ECHO | _termios.NOFLSH, *mode[4:]]


def with_signals(mode: list[Any]) -> list[Any]:
    """Return a mode in which Ctrl-C makes a signal, and keeps the keys before it."""
    return [*mode[:3], mode[3] | _termios.ISIG | _termios.NOFLSH, *mode[4:]]


def reads_lines(mode: list[Any]) -> bool:
    """Return whether a terminal gives whole lines."""
    return bool(mode[3] & _termios.ICANON)


def enable_escapes() -> None:
    """Let Windows' console obey escapes for colours, as other terminals do."""
    if WINDOWS:
        kernel = _kernel32()
        for stream in (_STDOUT, _STDERR):
            kernel.SetConsoleMode(kernel.GetStdHandle(stream), _CONSOLE_WITH_ESCAPES)


def start_with_socket(
    arguments: list[str], environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start Python with a socket in place of standard input. Return the process and our end.

    Ctrl-C does not reach the process. Its standard error is a pipe.
    """
    ours, theirs = socket.socketpair()
    # A virtual environment's Python on Windows starts another process, which gets no socket.
    python = getattr(sys, "_base_executable", sys.executable) if WINDOWS else sys.executable
    with theirs:
        process = subprocess.Popen(
            [python, *arguments],
            stdin=subprocess.PIPE if WINDOWS else theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        if process.stdin is not None:
            with suppress(OSError), process.stdin as pipe:
                pipe.write(getattr(theirs, "share")(process.pid))  # noqa: B009 - Windows has it
    if process.stderr is not None and not WINDOWS:
        _os.set_blocking(process.stderr.fileno(), False)
    return process, ours


def given_socket() -> socket.socket:
    """Return the socket that `start_with_socket` gave this process."""
    if WINDOWS:
        given: socket.socket = getattr(socket, "fromshare")(sys.stdin.buffer.read())  # noqa: B009
        return given
    return socket.socket(fileno=0)


def limit_process(memory: int) -> None:
    """Limit this process to `memory` bytes, and let it write no file and start no process.

    macOS does not know every limit, and Windows lets it write files.
    """
    if WINDOWS:
        _join_job(memory)
        return
    for name, most in (("AS", memory), ("CORE", 0), ("FSIZE", 0), ("NPROC", 0)):
        with suppress(ValueError, OSError):
            _resource.setrlimit(getattr(_resource, f"RLIMIT_{name}"), (most, most))
    signal.signal(_signal.SIGPROF, signal.SIG_DFL)  # the timer ends the process in any code
    _os.set_blocking(2, False)  # pages of errors must not wait for a reader


def limit_time(seconds: float) -> None:
    """End this process after so much computing time, or never for 0. Windows never does."""
    if not WINDOWS:
        _signal.setitimer(_signal.ITIMER_PROF, seconds)


def _join_job(memory: int) -> None:
    """Put this process into a job of Windows that limits it."""
    from ctypes import byref, c_uint64, c_void_p, sizeof

    kernel = _kernel32()
    limits = (c_uint64 * 18)()  # JOBOBJECT_EXTENDED_LIMIT_INFORMATION, as 64-bit Windows has it
    limits[2], limits[5], limits[14] = _MAX_MEMORY | _MAX_PROCESSES, 1, memory
    kernel.CreateJobObjectW.restype = c_void_p
    job = c_void_p(kernel.CreateJobObjectW(None, None))
    kernel.SetInformationJobObject(job, _EXTENDED_LIMITS, byref(limits), sizeof(limits))
    kernel.AssignProcessToJobObject(job, c_void_p(_THIS_PROCESS))


def _kernel32() -> Any:
    import ctypes

    return getattr(ctypes, "WinDLL")("kernel32")  # noqa: B009 - other systems lack it
