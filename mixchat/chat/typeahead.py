"""Lines that were typed while nobody read them: during an answer, or while a model loads."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from prompt_toolkit.input import Input
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyPress


@contextmanager
def unseen_keys(pause: Callable[[], object] = lambda: None) -> Iterator[None]:
    """What is typed meanwhile is not shown, where it would stand in the middle of an answer; it is
    not lost either, not even at Ctrl-C.

    Ctrl-Z gives the terminal back as it was, after a `pause`, and `fg` takes it again.
    """
    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    except (AttributeError, OSError, ValueError, termios.error):  # no terminal
        yield
        return
    local = before[3] & ~termios.ECHO | termios.NOFLSH
    quiet = [*before[:3], local, *before[4:]]

    def suspend(number: int, frame: FrameType | None) -> None:
        pause()
        _set(fd, before)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # until `fg`
        signal.signal(signal.SIGTSTP, suspend)
        _set(fd, quiet)

    _set(fd, quiet)
    previous = signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        try:
            _set(fd, before)
        finally:
            signal.signal(signal.SIGTSTP, previous)


def _set(fd: int, attributes: list[Any]) -> None:
    with suppress(OSError, termios.error):  # the terminal went away
        termios.tcsetattr(fd, termios.TCSANOW, attributes)


def take_typed_lines(source: Input) -> None:
    """Hand what waits in the terminal to the next prompt: one line with its Enter, several without.

    Outside a prompt the terminal turns Enter into a newline, which the prompt would take for
    Ctrl-J: a line would lie there unsent. Several lines were rather pasted, and are to be seen
    before they are sent.
    """
    try:
        typed = _waiting_text(source.fileno())
    except (OSError, termios.error, NotImplementedError, ValueError):
        return  # no terminal, or it went away: the prompt will see
    # Keys that the last prompt got too late come first; what waits may go on after them.
    before = get_typeahead(source)
    store_typeahead(source, before + _keys(typed if before else _one_or_unsent(typed)))


def _one_or_unsent(typed: str) -> str:
    """One line with its Enter if it has one; of several, the text. `\r` is Enter."""
    line = typed.strip("\r")
    if "\r" in line:
        return typed.lstrip("\r").replace("\r", "\n")
    return line + "\r" if line and typed.endswith("\r") else line


def _keys(text: str) -> list[KeyPress]:
    keys: list[KeyPress] = []
    parser = Vt100Parser(keys.append)
    parser.feed(text)
    parser.flush()
    return keys


def _waiting_text(fd: int) -> str:
    lines = b"".join(iter(lambda: _waiting_line(fd), b""))
    return lines.decode("utf-8", "replace").replace("\n", "\r")


def _waiting_line(fd: int) -> bytes:
    """The next whole line, which is all that a terminal gives outside a prompt."""
    if not os.isatty(fd) or not termios.tcgetattr(fd)[3] & termios.ICANON:
        return b""
    return os.read(fd, 65536) if select.select([fd], [], [], 0)[0] else b""
