"""A screen on which a prompt is seen, and hands that type into it."""

import fcntl
import os
import pty
import queue
import select
import struct
import termios
import threading
import time
from contextlib import contextmanager

import pyte
from patience import PATIENCE_S
from prompt_toolkit.application import create_app_session
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input.typeahead import clear_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.output.vt100 import Vt100_Output

from mixchat.chat.terminal.completion import CommandCompletion, file_names
from mixchat.chat.terminal.prompt import ChatPrompt

ENTER, CTRL_C, CTRL_D, CTRL_F, CTRL_J = "\r", "\x03", "\x04", "\x06", "\n"
CTRL_R, EDIT, ESC, TAB = "\x12", "\x18\x05", "\x1b", "\t"
COMMANDS = {
    "help": CommandCompletion("show this"),
    "load": CommandCompletion("load a file", file_names),
    "set": CommandCompletion("change a setting", lambda typed: ["temp", "top_p"]),
}


def bar():
    return "demo <b>&[x]"


class Eyes:
    """A screen of `width` columns, and hands: a prompt at it reads in a thread of its own."""

    def __init__(self, width, rows, options):
        self._screen = pyte.Screen(width, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._master, self.slave = pty.openpty()
        self._screen.write_process_input = self.type  # answers with the cursor's place
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, width, 0, 0))
        self._read = queue.Queue()
        self._out = os.fdopen(os.dup(self.slave), "w", encoding="utf-8")
        self._in = os.fdopen(os.dup(self.slave), encoding="utf-8")
        output = Vt100_Output(self._out, lambda: Size(rows, width), term="xterm")
        options = {"history": None, "commands": COMMANDS, "status": bar} | options
        self._source = Vt100Input(self._in)
        with create_app_session(self._source, output):
            self.prompt = ChatPrompt(**options)
        self._thread = None

    def ask(self):
        """Begin to read."""
        self._thread = threading.Thread(target=self._reading, daemon=True)
        self._thread.start()

    def _reading(self):
        try:
            self._read.put(self.prompt.read())
        except (KeyboardInterrupt, EOFError) as error:
            self._read.put(error)

    def type(self, text):
        os.write(self._master, text if isinstance(text, bytes) else text.encode())

    def read(self):
        """Return the line that the prompt has read."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self._look()
            if not self._read.empty():
                self._thread.join()
                return self._read.get()
        raise AssertionError(f"nothing was read; the screen: {self.lines}")

    def wait_for(self, text, there=True):
        """Wait until `text` is on the screen, or no longer."""
        deadline = time.monotonic() + PATIENCE_S
        while any(text in line for line in self.lines) != there:
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for {text!r}; the screen: {self.lines}")
            self._look()

    @property
    def lines(self):
        return [line.rstrip() for line in self._screen.display if line.strip()]

    def reversed(self, text):
        """Return whether the line with `text` is drawn in reverse."""
        number = next(n for n, line in enumerate(self._screen.display) if text in line)
        return self._screen.buffer[number][0].reverse

    def _look(self):
        if select.select([self._master], [], [], 0.02)[0]:
            self._stream.feed(os.read(self._master, 65536))

    def close(self):
        if self._thread and self._thread.is_alive():
            self.type(CTRL_C * 3)  # one may only end a search
            deadline = time.monotonic() + PATIENCE_S
            while self._thread.is_alive() and time.monotonic() < deadline:
                self._look()  # a full terminal would keep it from writing
        clear_typeahead(self._source)  # the next test's terminal may have the same number
        for file in (self._in, self._out):
            file.close()
        os.close(self._master)
        os.close(self.slave)


@contextmanager
def look(width=60, rows=12, ask=True, **options):
    eyes = Eyes(width, rows, options)
    try:
        if ask:
            eyes.ask()
            eyes.wait_for(">>>")
        yield eyes
    finally:
        eyes.close()
