"""How long work looks on standard error: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from mixchat.settings import format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

    from mixchat.progress import Progress

SECONDS_BETWEEN_LINES = 60.0


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """A `Progress` for this stream (standard error); its last bar is closed at the end."""
    stream = stream or sys.stderr
    progress = Bars(stream) if stream.isatty() else Lines(stream)
    try:
        yield progress
    finally:
        progress.end()


@contextmanager
def status(text: str, stream: TextIO | None = None) -> Iterator[None]:
    """Show `text` on a terminal while something takes its time, and take it away afterwards."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield
        return
    from rich.text import Text

    with _console(stream).status(Text(text)):
        yield


class Bars:
    """A bar on a terminal, with bytes, rate and the time that is left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: RichProgress | None = None

    def begin(self, what: str, total: int) -> None:
        from rich import progress

        self.end()
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=_console(self._stream),
        )
        self._bar.add_task(what, total=total)
        self._bar.start()

    def advance(self, amount: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], amount)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Lines:
    """A line when a phase begins and ends, and at most one a minute in between."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._what: str | None = None
        self._total = self._done = 0
        self._began = self._said = 0.0

    def begin(self, what: str, total: int) -> None:
        self.end()
        self._what, self._total, self._done = what, total, 0
        self._began = self._clock()
        self._say(f"{what}: {format_size(total)}")

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._what is not None and self._clock() - self._said >= SECONDS_BETWEEN_LINES:
            self._say(f"{self._what}: {format_size(self._done)} of {format_size(self._total)}")

    def end(self) -> None:
        if self._what is not None:
            seconds = self._clock() - self._began
            self._say(f"{self._what}: {format_size(self._done)} in {seconds:.0f} s")
            self._what = None

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
        self._said = self._clock()


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream)
