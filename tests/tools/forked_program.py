"""Programs that are forked from a process which has imported their modules.

A program with torch would take a second of a core to start, and a fork takes milliseconds. A forked
program is a process of its own, with its environment, standard error, signals and exit code.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

_FORKING = multiprocessing.get_context("forkserver")

Main = Callable[[Sequence[str]], object]


def preload(*modules: str) -> None:
    """Let the process that forks import these modules, if it has not started."""
    _FORKING.set_forkserver_preload(list(modules))


class ForkedProgram:
    """A program that calls `main`, which is a function of a module, with the arguments.

    stderr: what it writes to standard error, as text.
    """

    def __init__(
        self, main: Main, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        stderr, its_stderr = _FORKING.Pipe(duplex=False)
        with stderr, its_stderr:
            target = main, list(arguments), dict(environment), its_stderr
            self._process = _FORKING.Process(target=_run, args=target)
            self._process.start()
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


def _run(
    main: Main, arguments: Sequence[str], environment: Mapping[str, str], stderr: Connection
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with stderr:
        os.dup2(stderr.fileno(), 2)
    # The old one remembers whether its file could seek.
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    main(arguments)
