"""Programs that are forked from a process which has imported their modules.

A program with torch would take a second of a core to start, and a fork takes milliseconds. A forked
program is a process of its own, with its environment, standard error, signals and exit code.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

_FORKING = multiprocessing.get_context("forkserver")
_SERVING = "serving.installed_models", "serving.web.app", "serving.web.server"
_PRELOADED = (
    "cli.app",
    "cli.run",
    "chat.terminal.talk",
    "face.model",
    "face.local_models",
    *_SERVING,
)
_FORKING.set_forkserver_preload(["torch", *(f"mixchat.{module}" for module in _PRELOADED)])

Main = Callable[[Sequence[str]], object]


class ForkedProgram:
    """A program that calls `main`, which is a function of a module, with the arguments.

    stderr: what it writes to standard error, as text.
    """

    def __init__(
        self, main: Main, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        stderr, its_stderr = _FORKING.Pipe(duplex=False)
        with stderr, its_stderr:
            self._process = _started(main, list(arguments), dict(environment), its_stderr)
            self.stderr = os.fdopen(os.dup(stderr.fileno()))
        assert self._process.pid is not None
        self.pid = self._process.pid

    def send_signal(self, number: int) -> None:
        """Send a signal, if it runs."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> tuple[int, str]:
        """Return its exit code, and the standard error that was not read yet.

        A signal's number is negative.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"the program still runs after {timeout} s"
        return code, self.stderr.read()

    def close(self) -> None:
        """Kill it, if it runs, and close the files."""
        self._process.kill()
        self._process.join()
        self.stderr.close()


class TerminalProgram:
    """A program in a session of its own, with a terminal for its three streams.

    It has what the tests need of `subprocess.Popen`.
    """

    def __init__(
        self, main: Main, arguments: Sequence[str], environment: Mapping[str, str], terminal: int
    ) -> None:
        """`terminal` is a descriptor of a pseudo-terminal."""
        with Connection(os.dup(terminal)) as connection:
            self._process = _started(
                main, list(arguments), dict(environment), connection, is_terminal=True
            )
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Return its exit code, if it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code. A signal's number is negative."""
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"the program still runs after {timeout} s"
        return code


def _started(*program: object, is_terminal: bool = False) -> ForkServerProcess:
    """Return a process that runs a program: the first arguments of `_run`."""
    process = _FORKING.Process(target=_run, args=(*program, is_terminal))
    process.start()
    return process


def _run(
    main: Main,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    file: Connection,
    is_terminal: bool,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with file:
        if is_terminal:  # without one of its own, Ctrl-C is no signal
            os.setsid()
            fcntl.ioctl(file.fileno(), termios.TIOCSCTTY, 0)
        for stream in (0, 1, 2) if is_terminal else (2,):
            os.dup2(file.fileno(), stream)
    # The old ones remember whether their files could seek.
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if is_terminal:
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    main(arguments)
