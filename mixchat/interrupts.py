"""Ctrl-C, SIGTERM and SIGHUP: one place decides when a signal is acted on.

A process goes through three states:

- It starts, and nothing is open yet (`use_defaults`, `starting`). The system's default action ends
  it at once. An exception would be swallowed by an import, or break it, and while a large library
  is loaded Python runs no handler.
- Ordinary code. A signal raises `KeyboardInterrupt` or `SystemExit(128 + number)`.
- `held` code, whose bookkeeping must not be left between any two lines. A signal is remembered.
  `check` raises for it where nothing is half done, and so does the end of `held`.

SIGTERM and SIGHUP end the process within a second, except where something is being saved, or
native code runs that takes longer.
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
from types import FrameType, TracebackType
from typing import Any

_ENDING = (signal.SIGTERM, signal.SIGHUP)
_SIGNALS = (signal.SIGINT, *_ENDING)
_PATIENCE = 0.3  # seconds that the first Ctrl-C waits for a token
_GRACE = 0.7  # seconds until a process that has to end is ended
_AGAIN = 0.01  # seconds until an exception that was swallowed is raised again
_MAIN = threading.main_thread().ident

_SHOW_CURSOR, _NO_PASTE_MARKS = "\x1b[?25h", "\x1b[?2004l"


class _State:
    """The state of the main thread; there is one, as there is one of each signal."""

    held = 0  # how many `held` it is in
    saving = 0  # how many `saving` it is in
    pending: int | None = None  # a signal that came meanwhile
    ending: int | None = None  # the signal that ends the process
    swallowed = False  # the exception that was to do so
    asking: Callable[[], bool] | None = None  # of `stopping`
    overdue: Callable[[], bool] | None = None  # of these, the one whose patience is over
    terminal: list[Any] | None = None  # its attributes at the beginning


_state = _State()


def use_defaults() -> None:
    """Let a signal end the process at once. One that is ignored, as after `nohup`, stays so."""
    for number in _heard():
        signal.signal(number, signal.SIG_DFL)


def install() -> None:
    """Handle the signals from here on. One that is ignored, as after `nohup`, stays so."""
    _state.terminal = _terminal_attributes()
    if not isinstance(sys.unraisablehook, _RaiseAgain):
        sys.unraisablehook = _RaiseAgain(sys.unraisablehook)
    for number in _heard():
        signal.signal(number, _handle)


@contextmanager
def starting() -> Iterator[None]:
    """Let a signal end the process at once within: for large imports, while nothing is open."""
    if not _is_main():
        yield
        return
    before = {number: signal.getsignal(number) for number in _heard()}
    use_defaults()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def held() -> _Held:
    """Let no signal interrupt what is done within; `check` says where one may.

    In other threads than the main one, which gets no signals, this does nothing.
    """
    return _Held()


@contextmanager
def saving() -> Iterator[None]:
    """Keep the grace from ending the process within; the exception of a signal still comes."""
    _state.saving += 1
    try:
        yield
    finally:
        _state.saving -= 1


def check() -> None:
    """Raise for a signal that came within `held`. Nothing is to be half done here."""
    if _state.pending is not None and _is_main():
        number, _state.pending = _state.pending, None
        raise _exception(number)


@contextmanager
def stopping(ask: Callable[[], bool]) -> Iterator[None]:
    """Let the first Ctrl-C `ask` for the end of an answer; it says whether that will come soon.

    If not, or if the answer has not ended 0.3 s later, Ctrl-C is acted on as elsewhere.
    """
    before = _take_ctrl_c()
    _state.asking = ask
    try:
        yield
    finally:
        _state.asking = None  # first of all: what comes now is not for this answer
        _give_back(before)


def exit_code(code: int) -> int:
    """The exit code of a command that ended with `code`: a signal's, where one ends the process."""
    return code if _state.ending is None else 128 + _state.ending


class _Held:
    def __init__(self) -> None:
        self._main = _is_main()
        self._before: Callable[..., Any] | None = None

    def __enter__(self) -> None:
        if self._main:
            self._before = _take_ctrl_c()
            _state.held += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._main:
            return
        _state.held -= 1
        _give_back(self._before)
        if not _state.held and _state.pending is not None:
            number, _state.pending = _state.pending, None
            if self._before is not None and number == signal.SIGINT:
                self._before(number, None)
            else:
                raise _exception(number)


def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        if _state.ending is not None or _is_asked():
            return
    elif _state.ending is None:
        _state.ending = number
        _in_thread(_end_in_time)
    elif not _state.swallowed:  # once is enough: a chat may be being saved
        return
    _state.swallowed = False
    if _state.pending not in _ENDING:
        _state.pending = number
    if not _state.held:
        check()


def _is_asked() -> bool:
    """Ask for the end of an answer that is being given, unless its patience is over."""
    overdue, _state.overdue = _state.overdue, None
    if overdue is not None:
        return overdue is not _state.asking  # that answer has ended meanwhile
    if _state.asking is None or not _state.asking():
        return False
    _in_thread(_lose_patience, _state.asking)
    return True


def _lose_patience(asking: Callable[[], bool]) -> None:
    time.sleep(_PATIENCE)
    if _state.asking is asking and _MAIN is not None:
        _state.overdue = asking
        signal.pthread_kill(_MAIN, signal.SIGINT)


def _end_in_time() -> None:
    """End the process although the main thread is stuck, or has lost the exception."""
    time.sleep(_GRACE)
    while _state.saving:
        time.sleep(0.01)
    _restore_terminal()
    os._exit(exit_code(0))


class _RaiseAgain:
    """Hears of exceptions that were swallowed, as by a callback of the import system.

    One of ours is raised again, a little later and elsewhere; `others` gets what is not ours.
    """

    def __init__(self, others: Callable[[Any], object]) -> None:
        self._others = others

    def __call__(self, lost: Any) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            _in_thread(_send_again, signal.SIGINT)
        elif isinstance(lost.exc_value, SystemExit) and _state.ending is not None:
            _state.swallowed = True
            _in_thread(_send_again, _state.ending)
        else:
            self._others(lost)


def _send_again(number: int) -> None:
    time.sleep(_AGAIN)
    if _MAIN is not None:
        signal.pthread_kill(_MAIN, number)


def _in_thread(work: Callable[..., None], *arguments: Any) -> None:
    # Not `threading.Thread`: the handler may run while the main thread holds that module's locks.
    with suppress(RuntimeError):  # no more threads: then it has to go without
        _thread.start_new_thread(work, arguments)


def _heard() -> list[signal.Signals]:
    """The signals that are not ignored, and not handled by somebody beyond Python."""
    return [n for n in _SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _is_main() -> bool:
    return _thread.get_ident() == _MAIN


def _take_ctrl_c() -> Callable[..., Any] | None:
    """Handle Ctrl-C, if it is not done yet, in place of the handler that is returned."""
    before = signal.getsignal(signal.SIGINT)
    if before is _handle or not callable(before) or not _is_main():
        return None
    signal.signal(signal.SIGINT, _handle)
    return before


def _give_back(before: Callable[..., Any] | None) -> None:
    if before is not None:
        signal.signal(signal.SIGINT, before)


def _terminal_attributes() -> list[Any] | None:
    import termios

    try:
        return termios.tcgetattr(sys.stdin.fileno())
    except (AttributeError, OSError, ValueError, termios.error):  # no terminal
        return None


def _restore_terminal() -> None:
    """Undo what an answer or a bar has changed, which nobody else does where the end is hard."""
    if _state.terminal is None:
        return
    import termios

    with suppress(OSError, ValueError, AttributeError, termios.error):
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, _state.terminal)
        if os.isatty(2):
            os.write(2, (_SHOW_CURSOR + _NO_PASTE_MARKS).encode())
