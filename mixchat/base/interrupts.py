"""Ctrl-C, SIGTERM and SIGHUP, and the moment at which each takes effect.

- While a process starts (`use_defaults`, `starting`), the system's default action ends it at once.
  Python runs no handler while a large library loads.
- In ordinary code, a signal raises `KeyboardInterrupt` or `SystemExit(128 + number)`.
- In `deferred`, a signal is stored. `check` raises its exception, and so does the block's end.

SIGTERM and SIGHUP end the process within a second, except while something is being saved.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from mixchat.base import system

ENDING = (signal.SIGTERM, signal.SIGHUP)  # the process
_SIGNALS = (signal.SIGINT, *ENDING)
_CTRL_C_TIMEOUT_S = 0.3  # until a Ctrl-C that did not end the answer raises
_END_TIMEOUT_S = 0.7  # until it is ended by force
_RAISE_AGAIN_S = 0.01  # until a swallowed exception is raised again
_MAIN = threading.main_thread().ident or 0

_SHOW_CURSOR = "\x1b[?25h"
_NO_PASTE_MARKS = "\x1b[?2004l"


class _SignalState:
    """The state of the main thread, which alone gets signals."""

    deferred = 0  # `deferred` blocks around it
    saving = 0  # `saving` blocks around it
    pending: int | None = None  # a signal that came in a `deferred` block
    ending: int | None = None  # the signal that ends it
    swallowed = False  # whether its exception was swallowed
    stop: Callable[[], bool] | None = None  # of the `stopping` block it is in
    overdue: Callable[[], bool] | None = None  # a `stop` called too long ago
    terminal: list[Any] | None = None  # its mode at the beginning


_state = _SignalState()


def use_defaults() -> None:
    """Let a signal end the process at once, unless it is ignored, as after `nohup`."""
    for number in _handled():
        signal.signal(number, signal.SIG_DFL)


def install() -> None:
    """Install our handlers, except for signals that are ignored."""
    _state.terminal = system.terminal_mode(sys.stdin)
    if not isinstance(sys.unraisablehook, _RaiseAgain):
        sys.unraisablehook = _RaiseAgain(sys.unraisablehook)
    for number in _handled():
        signal.signal(number, _handle)


def are_installed() -> bool:
    """Return whether the process is mixchat's own, and not a program that uses it."""
    return any(signal.getsignal(number) is _handle for number in _SIGNALS)


@contextmanager
def starting() -> Iterator[None]:
    """Let a signal end the process at once in this block, which opens nothing.

    Only our own handlers are replaced. Those of a program that uses mixchat stay.
    """
    own = [number for number in _SIGNALS if signal.getsignal(number) is _handle and _is_main()]
    for number in own:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in own:
            signal.signal(number, _handle)


@contextmanager
def deferred() -> Iterator[None]:
    """Defer signals until the end of this block, or until `check` is called in it."""
    if not _is_main():
        yield
        return
    previous = _take_ctrl_c()
    _state.deferred += 1
    try:
        yield
    finally:
        _state.deferred -= 1
        _give_back(previous)
        if not _state.deferred and _state.pending is not None:
            number = _state.pending
            _state.pending = None
            if previous is None or number != signal.SIGINT:
                raise _exception(number)
            previous(number, None)


@contextmanager
def saving() -> Iterator[None]:
    """Do not end the process by force in this block. A signal still raises its exception."""
    _state.saving += 1
    try:
        yield
    finally:
        _state.saving -= 1


def check() -> None:
    """Raise the exception of a deferred signal. Nothing may be half done."""
    if _state.pending is not None and _is_main():
        number = _state.pending
        _state.pending = None
        raise _exception(number)


@contextmanager
def stopping(stop: Callable[[], bool]) -> Iterator[None]:
    """Let the first Ctrl-C call `stop`, which returns whether the answer will end soon.

    If it will not, or has not ended 0.3 s later, Ctrl-C raises as in ordinary code.
    """
    previous = _take_ctrl_c()
    _state.stop = stop
    try:
        yield
    finally:
        _state.stop = None  # first: a signal that comes now is not for this answer
        _give_back(previous)


def exit_code(code: int) -> int:
    """Return `code`, or the exit code of the signal that ends the process."""
    return code if _state.ending is None else 128 + _state.ending


def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        if _state.ending is not None or _stop_answer():
            return
    elif _state.ending is None:
        _state.ending = number
        _in_thread(_end_in_time)
    elif not _state.swallowed:  # once is enough, since a chat may just be saved
        return
    _state.swallowed = False
    if _state.pending not in ENDING:
        _state.pending = number
    if not _state.deferred:
        check()


def _stop_answer() -> bool:
    """Stop the current answer, and return whether that is enough."""
    overdue = _state.overdue
    _state.overdue = None
    if overdue is not None:
        return overdue is not _state.stop  # that answer has ended meanwhile
    stop = _state.stop
    if stop is None or not stop():
        return False

    def repeat() -> None:
        """Send Ctrl-C again if the answer still runs."""
        time.sleep(_CTRL_C_TIMEOUT_S)
        if _state.stop is stop:
            _state.overdue = stop
            signal.pthread_kill(_MAIN, signal.SIGINT)

    _in_thread(repeat)
    return True


def _end_in_time() -> None:
    """End the process if the main thread is stuck."""
    time.sleep(_END_TIMEOUT_S)
    while _state.saving:
        time.sleep(0.01)
    if _state.terminal is not None:
        system.set_terminal_mode(sys.stdin, _state.terminal)
        with suppress(OSError):
            if os.isatty(2):
                os.write(2, (_SHOW_CURSOR + _NO_PASTE_MARKS).encode())
    os._exit(exit_code(0))


class _RaiseAgain:
    """A hook that raises our exceptions again if they were swallowed."""

    def __init__(self, next_hook: Callable[[Any], object]) -> None:
        self._next_hook = next_hook

    def __call__(self, lost: Any) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            _in_thread(_send_again, signal.SIGINT)
        elif isinstance(lost.exc_value, SystemExit) and _state.ending is not None:
            _state.swallowed = True
            _in_thread(_send_again, _state.ending)
        else:
            self._next_hook(lost)


def _send_again(number: int) -> None:
    time.sleep(_RAISE_AGAIN_S)
    signal.pthread_kill(_MAIN, number)


def _in_thread(work: Callable[..., None], *arguments: Any) -> None:
    # `threading.Thread` could wait for a lock that the main thread holds.
    with suppress(RuntimeError):  # the limit of threads is reached
        _thread.start_new_thread(work, arguments)


def _handled() -> list[signal.Signals]:
    """Return the signals that are not ignored, nor handled outside of Python."""
    return [n for n in _SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _is_main() -> bool:
    return _thread.get_ident() == _MAIN


def _take_ctrl_c() -> Callable[..., Any] | None:
    """Install our handler of Ctrl-C, if need be, and return the old one."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is _handle or not callable(previous) or not _is_main():
        return None
    signal.signal(signal.SIGINT, _handle)
    return previous


def _give_back(previous: Callable[..., Any] | None) -> None:
    if previous is not None:
        signal.signal(signal.SIGINT, previous)
