"""A program in a pseudo-terminal of its own: type into it, wait for what it shows."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

import fake_mixchat
from command_line import FAKE
from forked_program import TerminalProgram
from patience import PATIENCE_S

# A new session has no controlling terminal, and without one Ctrl-C is no signal.
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """`with Terminal(command, environment) as terminal`; stderr goes to the screen, too."""

    def __init__(self, command, environment):
        self._master, slave = pty.openpty()
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.screen = b""
        self._seen = 0
        environment = environment | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        if command[: len(FAKE)] == FAKE:  # which takes seconds of a core to start
            arguments = command[len(FAKE) :]
            self.process = TerminalProgram(fake_mixchat.main, arguments, environment, slave)
        else:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _TAKE_TERMINAL, *command],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env=environment,
                start_new_session=True,
            )
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text):
        os.write(self._master, text.encode())

    def enter(self, line):
        """Type a line at the prompt of a chat."""
        self.wait_for(">>>")
        self.type(line + "\r")

    def leave(self):
        """End a chat with Ctrl-D."""
        self.wait_for(">>>")
        self.type("\x04")
        assert self.wait_for_end() == 0

    def wait_for(self, text, seconds=PATIENCE_S):
        """Return the output up to and with `text`, since the last call."""
        wanted = text.encode()
        deadline = time.monotonic() + seconds
        while (at := self.screen.find(wanted, self._seen)) < 0:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{text!r} did not come; the screen: {self.screen!r}")
        before, self._seen = self._seen, at + len(wanted)
        return self.screen[before : self._seen].decode()

    def look(self):
        """The whole screen, with what has come by now."""
        while self._read(0):
            pass
        return self.screen.decode(errors="replace")

    def wait_for_end(self, seconds=PATIENCE_S):
        """The exit code."""
        deadline = time.monotonic() + seconds
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(deadline - time.monotonic(), 0.1))

    def _read(self, seconds):
        if not select.select([self._master], [], [], max(seconds, 0))[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the program has closed its side
            return False
        self.screen += data
        return bool(data)
