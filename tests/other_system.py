"""mixchat's commands on Linux as if it were Windows or macOS, for a process of its own.

    python tests/other_system.py win32 run -m tiny Hi

What the system lacks is taken away from mixchat. Other packages are imported before and keep it, as
wheels for that system would work there. As on Windows, open files can be neither renamed nor
removed, files that are open for reading cannot be synced, directories cannot be opened, and there
are no links.
"""

from __future__ import annotations

import array
import builtins
import ctypes
import errno
import importlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGES = (
    *("torch", "bitsandbytes", "llvmlite.binding", "psutil", "platformdirs", "filelock", "numpy"),
    *("typer", "rich.console", "rich.live", "prompt_toolkit", "huggingface_hub", "uvicorn.config"),
    *("starlette.applications", "anyio", "httpcore2", "zmq", "zmq.auth.thread", "pydantic"),
    *("llguidance", "gguf", "tokenizers", "sentencepiece", "jinja2.sandbox", "subprocess"),
    *("anyio._backends._asyncio", "uvicorn.protocols.http.h11_impl", "concurrent.futures.thread"),
)
_MODULES = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "readline")
_FUNCTIONS = {
    "win32": (
        *("pread", "preadv", "pwrite", "pwritev", "readv", "writev", "posix_fadvise", "fchmod"),
        *("sched_getaffinity", "sched_yield", "geteuid", "getuid"),
        *("set_blocking", "sysconf", "mkfifo", "fork"),
        *("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY"),
    ),
    "darwin": ("posix_fadvise", "sched_getaffinity", "O_DIRECT"),
}
_SIGNALS = (
    *("SIGHUP", "SIGPROF", "SIGTSTP", "SIGSTOP", "SIGCONT", "SIGUSR1", "SIGUSR2", "ITIMER_PROF"),
    *("setitimer", "pthread_kill", "pthread_sigmask"),
)
_ACCESS = 0x3  # mask of an open file's flags, 0 for reading


def become(system: str, packages: tuple[str, ...] = _PACKAGES) -> None:
    """Make this process take Linux for another system, "win32" or "darwin"."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for name in packages:
        importlib.import_module(name)
    if system == "win32":
        _lend_sockets()
        _forbid_what_windows_forbids(_open_mode())
        ctypes.WinDLL = Kernel  # type: ignore[attr-defined]
        sys.modules.update(dict.fromkeys(_MODULES))  # type: ignore[arg-type]
        sys.modules["signal"] = _without(signal, _SIGNALS)
    sys.modules["os"] = _without(os, _FUNCTIONS[system])
    before, sys.platform = sys.platform, system
    importlib.import_module("mixchat.base.system")  # alone asks for the platform
    sys.platform = before


def _without(module: ModuleType, names: tuple[str, ...]) -> ModuleType:
    """Return a module like this one that lacks some names."""
    double = ModuleType(module.__name__)
    kept = {name: value for name, value in vars(module).items() if name not in names}
    vars(double).update(kept)
    return double


class Kernel:
    """A library of Windows, whose functions do nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*arguments: object) -> int:
            return 1

        return function


def _open_mode() -> Callable[[int], int]:
    import fcntl

    return lambda descriptor: fcntl.fcntl(descriptor, fcntl.F_GETFL) & _ACCESS


def _forbid_what_windows_forbids(open_mode: Callable[[int], int]) -> None:
    os.O_BINARY = 1 << 30  # type: ignore[attr-defined]
    rename, replace, remove, sync, open_file = os.rename, os.replace, os.unlink, os.fsync, os.open

    def open_checked(path: Any, flags: int, mode: int = 0o777, **how: Any) -> int:
        caller = sys._getframe(1).f_globals["__name__"]
        if caller.startswith("mixchat."):
            if os.path.isdir(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            binary = flags & os.O_BINARY or path == os.devnull  # type: ignore[attr-defined]
            assert binary, f"{caller} opens {path} as text"
        return open_file(path, flags & ~os.O_BINARY, mode, **how)  # type: ignore[attr-defined]

    def sync_checked(descriptor: Any) -> None:
        if open_mode(descriptor) == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        sync(descriptor)

    def unless_open(act: Callable[..., None]) -> Callable[..., None]:
        def act_checked(*paths: Any, **how: Any) -> None:
            for path in paths:
                if os.path.realpath(path) in _open_files():
                    raise PermissionError(errno.EACCES, "The file is in use", str(path))
            act(*paths, **how)

        return act_checked

    def refuse_link(*paths: Any, **how: Any) -> None:
        raise OSError(errno.EPERM, "A required privilege is not held by the client")

    os.open, os.fsync, os.symlink = open_checked, sync_checked, refuse_link
    os.rename, os.replace = unless_open(rename), unless_open(replace)
    os.unlink = os.remove = unless_open(remove)


def _open_files() -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the listing's own
            continue
    return found


def _lend_sockets() -> None:
    """Pass sockets to other processes as Windows does, by bytes that name them."""

    def share(self: socket.socket, process: int) -> bytes:
        path = os.path.join(tempfile.mkdtemp(prefix="mixchat-"), "s")
        listener, lent = socket.socket(socket.AF_UNIX), self.dup()
        listener.bind(path)
        listener.listen()

        def lend() -> None:
            with listener, lent:
                listener.settimeout(60)
                taker, _ = listener.accept()
                with taker:
                    rights = array.array("i", [lent.fileno()])
                    taker.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            shutil.rmtree(os.path.dirname(path))

        threading.Thread(target=lend, daemon=True).start()
        return path.encode()

    def fromshare(data: bytes) -> socket.socket:
        with socket.socket(socket.AF_UNIX) as giver:
            giver.connect(data.decode())
            _, descriptors, *_ = socket.recv_fds(giver, 1, 1)
        return socket.socket(fileno=descriptors[0])

    socket.socket.share = share  # type: ignore[attr-defined]
    socket.fromshare = fromshare  # type: ignore[attr-defined]


def _use_double_in_sandboxes(system: str) -> None:
    from mixchat.text import sandbox

    *flags, code = sandbox._COMMAND
    start = f"import other_system; other_system.become({system!r}, ()); importlib"
    sandbox._COMMAND = (*flags, code.replace("importlib.import_module", f"{start}.import_module"))


def main(system: str, *arguments: str) -> None:
    """Run a command line, or several with `and` between them, until one fails."""
    become(system)
    _use_double_in_sandboxes(system)
    from mixchat.cli.app import run

    commands: list[list[str]] = [[]]
    for argument in arguments:
        commands.append([]) if argument == "and" else commands[-1].append(argument)
    for command in commands:
        try:
            run(command)
        except SystemExit as ending:
            if ending.code:
                builtins.print(f"{command}: exit code {ending.code}", file=sys.stderr)
                raise


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
