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

_CTRL_D = b"\x04"
# A terminal puts these around what is pasted, where it was told to mark that.
_MARK_PASTES, _NO_MARKS = b"\x1b[?2004h", b"\x1b[?2004l"
_PASTE, _END_OF_PASTE = b"\x1b[200~", b"\x1b[201~"
_SILENCE = 0.5  # seconds after which the rest of a paste is given up


@contextmanager
def unseen_keys(pause: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Keep what is typed meanwhile off the screen, where it would stand in the middle of an answer.
    It is not lost, not even at Ctrl-C, and a paste stays one.

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
        _set(fd, before, _NO_MARKS)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # until `fg`
        signal.signal(signal.SIGTSTP, suspend)
        _set(fd, quiet, _MARK_PASTES)

    _set(fd, quiet, _MARK_PASTES)
    previous = signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        try:
            _set(fd, before, _NO_MARKS)
        finally:
            signal.signal(signal.SIGTSTP, previous)


def _set(fd: int, attributes: list[Any], marks: bytes) -> None:
    with suppress(OSError, termios.error):  # the terminal went away
        termios.tcsetattr(fd, termios.TCSANOW, attributes)
        if os.isatty(1) and os.environ.get("TERM") != "dumb":
            sys.stdout.flush()
            os.write(1, marks)


@contextmanager
def reading_keys(source: Input) -> Iterator[None]:
    """Hand what waits in the terminal to the prompt within, as if it were typed there: each line is
    sent by its Enter, Ctrl-D leaves, and a marked paste lies there unsent.

    Outside a prompt the terminal turns Enter into a newline, which the prompt would take for
    Ctrl-J: a line would lie there unsent. That also holds for a line that comes after a look at
    what waits. So there is a second look when the terminal has stopped doing it.
    """
    _take(source, _waiting_bytes)
    with source.raw_mode():
        _take(source, _late_bytes)
        yield


def _take(source: Input, read: Callable[[Input], bytes]) -> None:
    try:
        typed = read(source)
    except (OSError, termios.error, NotImplementedError, ValueError):
        return  # no terminal, or it went away: the prompt will see
    text = typed.decode("utf-8", "replace").replace("\n", "\r")
    # Keys that the last prompt got too late come first; what waits may continue them.
    before = get_typeahead(source)
    store_typeahead(source, before + _keys(text if before else text.lstrip("\r")))


def _keys(text: str) -> list[KeyPress]:
    keys: list[KeyPress] = []
    parser = Vt100Parser(keys.append)
    parser.feed(text)
    parser.flush()
    return keys


def _waiting_bytes(source: Input) -> bytes:
    """All whole lines, and the rest of a paste whose end is not a whole line."""
    fd, typed = source.fileno(), b""
    while (line := _waiting_line(fd)) is not None:
        typed += line or _CTRL_D  # for what a terminal gives at Ctrl-D is nothing
        if not line:
            break  # also where the terminal went away: it gives nothing for ever
    if typed.rfind(_PASTE) <= typed.rfind(_END_OF_PASTE):
        return typed
    with source.raw_mode():
        while typed.rfind(_PASTE) > typed.rfind(_END_OF_PASTE):
            piece = os.read(fd, 65536) if select.select([fd], [], [], _SILENCE)[0] else b""
            typed += piece or _END_OF_PASTE
    return typed


def _late_bytes(source: Input) -> bytes:
    """All that waits in a terminal that was just put into raw mode."""
    fd, typed = source.fileno(), b""
    while os.isatty(fd) and select.select([fd], [], [], 0)[0] and (piece := os.read(fd, 65536)):
        typed += piece
    return typed.replace(b"\0", _CTRL_D)  # which is stored as a zero until raw mode begins


def _waiting_line(fd: int) -> bytes | None:
    """The next whole line, which is all that a terminal gives outside a prompt, if there is one."""
    if not os.isatty(fd) or not termios.tcgetattr(fd)[3] & termios.ICANON:
        return None
    return os.read(fd, 65536) if select.select([fd], [], [], 0)[0] else None
