"""Programs that are forked from a process which has imported them.

A program with torch would take a second of a core to start, and a fork takes milliseconds. A forked
program is a process of its own, with its environment, standard error, signals and exit code.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress


class ForkedProgram:
    """A program that runs, or has ended. `returncode` is None until `poll` or `wait` sees its end.

    stderr: what it writes to standard error, as text.
    """

    def __init__(self, stderr: int, status: int) -> None:
        self.stderr = os.fdopen(stderr)
        self._status = os.fdopen(status)
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def poll(self, timeout: float = 0) -> int | None:
        """Return its exit code, or None if it runs. A signal's number is negative."""
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout: float) -> tuple[int, str]:
        """Return its exit code, and the standard error that was not read yet."""
        code = self.poll(timeout)
        if code is None:
            raise TimeoutError(f"the program still runs after {timeout} s")
        return code, self.stderr.read()

    def close(self) -> None:
        """Kill it, if it runs, and close the files."""
        self.send_signal(signal.SIGKILL)
        self.poll(60)
        self.stderr.close()
        self._status.close()


class ForkingProcess:
    """A process that has imported `modules`, and forks programs that call `main` of the first."""

    def __init__(self, *modules: str, path: Sequence[str]) -> None:
        self._orders, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *modules],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                pass_fds=[theirs.fileno()],
            )

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> ForkedProgram:
        """Return a program with these arguments of `main`."""
        (stderr, its_stderr), (status, its_status) = os.pipe(), os.pipe()
        order = json.dumps([list(arguments), dict(environment)]).encode() + b"\n"
        # The descriptors arrive with the first byte.
        socket.send_fds(self._orders, [order[:1]], [its_stderr, its_status])
        self._orders.sendall(order[1:])
        os.close(its_stderr)
        os.close(its_status)
        return ForkedProgram(stderr, status)

    def end(self) -> None:
        """End the process. Its programs are not ended."""
        self._orders.close()
        self._process.wait(60)


def _fork_programs(orders: socket.socket) -> tuple[list[str], int] | None:
    """Fork a program for each order. Return its arguments and standard error, None in the end."""
    while True:
        begun, descriptors, *_ = socket.recv_fds(orders, 1, 2)
        if not begun:
            return None
        with orders.makefile("rb", 0) as rest:
            arguments, environment = json.loads(begun + rest.readline())
        stderr, status = descriptors
        # Only a parent learns of an exit code. So each program has one, which writes it down.
        if os.fork() == 0:
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            program = os.fork()
            if program == 0:
                os.close(status)
                os.environ.clear()
                os.environ.update(environment)
                return arguments, stderr
            os.close(stderr)
            os.write(status, f"{program}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
            os.write(status, f"{code}\n".encode())
            os._exit(0)
        os.close(stderr)
        os.close(status)


def main() -> None:
    """Import the modules, fork, and run the program in each fork."""
    orders, *modules = sys.argv[1:]
    program, *_ = map(importlib.import_module, modules)
    gc.freeze()  # a collection would copy the pages of what all forks share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    if (forked := _fork_programs(socket.socket(fileno=int(orders)))) is not None:
        arguments, stderr = forked
        os.dup2(stderr, 2)
        os.close(stderr)
        # The old one remembers whether its file could seek.
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        program.main(arguments)


if __name__ == "__main__":
    main()
