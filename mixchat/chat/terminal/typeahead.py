"""Keeps the keys that are typed while nothing reads them, as during an answer."""

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
from prompt_toolkit.keys import Keys

from mixchat.base import system

_CTRL_D = b"\x04"
# A terminal puts these around a paste, if it was told to mark pastes.
_MARK_PASTES = b"\x1b[?2004h"
_NO_MARKS = b"\x1b[?2004l"
_PASTE = b"\x1b[200~"
_END_OF_PASTE = b"\x1b[201~"
_PASTE_TIMEOUT_S = 0.5  # for the rest of a paste


@contextmanager
def unseen_keys(pause: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Keep keys that are typed meanwhile off the screen, which may show an answer.

    They are not lost, not even at Ctrl-C, and a paste stays one. Ctrl-Z calls `pause` and restores
    the terminal. `fg` takes it again.
    """
    usual = system.terminal_mode(sys.stdin)
    if usual is None:
        yield
        return
    # No echo, and the keys are kept at Ctrl-C.
    quiet = [*usual[:3], usual[3] & ~termios.ECHO | termios.NOFLSH, *usual[4:]]

    def suspend(number: int, frame: FrameType | None) -> None:
        pause()
        _set(usual, _NO_MARKS)
        # Only the default action stops the process. A handler has to take its own place again.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # until `fg`
        signal.signal(number, suspend)
        _set(quiet, _MARK_PASTES)

    previous = signal.signal(signal.SIGTSTP, suspend)
    try:
        _set(quiet, _MARK_PASTES)
        yield
    finally:
        _set(usual, _NO_MARKS)
        signal.signal(signal.SIGTSTP, previous)


def _set(mode: list[Any], marks: bytes) -> None:
    system.set_terminal_mode(sys.stdin, mode)
    with suppress(OSError):  # the terminal went away
        if os.isatty(1) and os.environ.get("TERM") != "dumb":
            sys.stdout.flush()  # what Python buffers belongs before the mark
            os.write(1, marks)


@contextmanager
def reading_keys(source: Input) -> Iterator[None]:
    """Pass the keys that wait in the terminal to the prompt within, as if they were typed there.

    Raises `KeyboardInterrupt` at the end if Ctrl-C came after the Enter that ended the prompt.
    """
    # Raw mode also shows an unfinished line. In it, no line can be completed after the look.
    with source.raw_mode():
        _take(source)
        yield
        if mode := system.terminal_mode(source):
            # From here on Ctrl-C makes a signal, and the terminal keeps the keys before it.
            with_signals = [*mode[:3], mode[3] | termios.ISIG | termios.NOFLSH, *mode[4:]]
            system.set_terminal_mode(source, with_signals)
        _take(source)
        waiting = get_typeahead(source)
        keys = [press.key for press in waiting]
        if Keys.ControlM in keys:  # the Enter of another line, whose Ctrl-C is its own
            keys = keys[: keys.index(Keys.ControlM)]
        stopped = Keys.ControlC in keys
        if stopped:
            del waiting[keys.index(Keys.ControlC)]
        store_typeahead(source, waiting)
        if stopped:
            raise KeyboardInterrupt


def _take(source: Input) -> None:
    """Store the keys that wait in a terminal that was just put into raw mode, whole pastes only.

    Outside a prompt the terminal turned Enter into a newline, which the prompt would take for
    Ctrl-J, and Ctrl-D into a zero.
    """
    typed = b""
    pasting = False
    timeout = 0.0
    try:
        fd = source.fileno()
        while os.isatty(fd) and select.select([fd], [], [], timeout)[0]:
            piece = os.read(fd, 65536)
            typed += piece
            pasting = bool(piece) and typed.rfind(_PASTE) > typed.rfind(_END_OF_PASTE)
            timeout = _PASTE_TIMEOUT_S if pasting else 0.0
            if not piece:  # the terminal went away, which returns nothing for ever
                break
    except (OSError, NotImplementedError, ValueError):
        return  # without a terminal, or if it went away, which the prompt will notice
    typed = typed.replace(b"\0", _CTRL_D) + (_END_OF_PASTE if pasting else b"")
    text = typed.decode("utf-8", "replace").replace("\n", "\r")
    # Keys that the last prompt got too late come first. The waiting ones may continue them.
    keys = get_typeahead(source)
    parser = Vt100Parser(keys.append)
    # Enter alone, before anything was typed, is only impatience.
    parser.feed(text if keys else text.lstrip("\r"))
    parser.flush()
    store_typeahead(source, keys)
