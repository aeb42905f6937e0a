"""Shows the progress of long work on standard error."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from mixchat.base.progress import NoProgress
from mixchat.base.quantities import format_size, format_time
from mixchat.chat.printing import fitted, one_line, say
from mixchat.cli.output import messages

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from mixchat.base.progress import Progress, Task

_LINE_INTERVAL_S = 60.0  # into a log, a download of an hour writes 60 lines


@dataclass(frozen=True)
class TerminalReporter:
    """A `Reporter` on standard error. A `quiet` one prints only errors."""

    quiet: bool = False

    def note(self, text: str) -> None:
        if not self.quiet:
            messages.note(text)

    def error(self, error: Exception) -> int:
        return messages.print_error(error)

    def status(self, text: str) -> AbstractContextManager[Callable[[str], None]]:
        return nullcontext(lambda text: None) if self.quiet else status(text)

    def progress(self) -> AbstractContextManager[Progress]:
        return nullcontext(NoProgress()) if self.quiet else show_progress()


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Yield a `Progress` for a stream, standard error by default."""
    stream = stream or sys.stderr
    progress = Bars(stream) if stream.isatty() else Lines(stream)
    try:
        yield progress
    finally:
        progress.close()


@contextmanager
def status(text: str, stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Show `text` on a terminal meanwhile. Yield a function that replaces it."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield lambda text: None
        return
    from rich.text import Text

    # As `Text`, because Rich would read markup in a string, such as a model's name in brackets.
    with _console(stream).status(Text(one_line(text))) as shown:
        yield lambda text: shown.update(Text(one_line(text)))


@contextmanager
def resumable(progress: Progress, hint: str = "the same command resumes") -> Iterator[None]:
    """Print at Ctrl-C how to resume or restart the work."""
    try:
        yield
    except KeyboardInterrupt:
        progress.note(f"interrupted; {hint}")
        raise


class Bars:
    """Bars on a terminal, with bytes, rate and remaining time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars: RichProgress | None = None

    def task(self, name: str, total: int, done: int = 0) -> Task:
        if self._bars is None:
            self._bars = _rich_progress(self._stream)
            self._bars.start()
        return _Bar(self._bars, self._bars.add_task(one_line(name), total=total, completed=done))

    def note(self, text: str) -> None:
        from rich.text import Text

        console = self._bars.console if self._bars is not None else _console(self._stream)
        for line in text.split("\n"):
            console.print(Text(fitted(one_line(line), self._stream)), soft_wrap=True)

    def close(self) -> None:
        """Stop the bars, which stay on the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class _Bar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: int) -> None:
        # A thread that fetches may move the bar after it was closed.
        self._bars.advance(self._task, amount)

    def close(self) -> None:
        self._bars.stop_task(self._task)


class Lines:
    """Prints a line when a task starts and ends, and one a minute in between.

    Threads that fetch shards at the same time share it.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._lock = threading.RLock()  # `ended` and `moved` print with it
        self._tasks: list[_TaskLine] = []
        self._last_line = clock()

    def task(self, name: str, total: int, done: int = 0) -> Task:
        with self._lock:
            task = _TaskLine(self, name, total, done, self._clock())
            self._tasks.append(task)
            finished = f", {format_size(done)} of it already done" if done else ""
            self.note(f"{name}: {format_size(total)}{finished}")
        return task

    def note(self, text: str) -> None:
        with self._lock:
            say(*text.split("\n"), stream=self._stream)

    def close(self) -> None:
        for task in list(self._tasks):
            task.close()

    def moved(self) -> None:
        """Print the tasks' progress once a minute."""
        with self._lock:
            now = self._clock()
            if not self._tasks or now - self._last_line < _LINE_INTERVAL_S:
                return
            self._last_line = now
            self.note("; ".join(task.state(now) for task in self._tasks))

    def ended(self, task: _TaskLine) -> None:
        with self._lock:
            if task in self._tasks:
                self._tasks.remove(task)
                self.note(task.outcome(self._clock()))


class _TaskLine:
    """A task's progress. The printed rate is the rate since the line before."""

    def __init__(self, lines: Lines, name: str, total: int, done: int, now: float) -> None:
        self._lines = lines
        self._name = name
        self._total = total
        self._done = done
        self._first = done
        self._began = self._last = now
        self._last_done = done

    def advance(self, amount: int) -> None:
        self._done += amount
        # A transfer moves back over bytes that proved damaged, and fetches them again.
        self._first = min(self._first, self._done)
        self._lines.moved()

    def close(self) -> None:
        self._lines.ended(self)

    def state(self, now: float) -> str:
        text = f"{self._name}: {format_size(self._done)} of {format_size(self._total)}"
        seconds = now - self._last
        came = self._done - self._last_done
        self._last = now
        self._last_done = self._done
        if seconds <= 0 or came <= 0:
            return text
        remaining = (self._total - self._done) * seconds / came
        return f"{text}, {format_size(int(came / seconds))}/s, {format_time(remaining)} left"

    def outcome(self, now: float) -> str:
        came = format_size(self._done - self._first)
        took = now - self._began
        return f"{self._name}: {came} in {'less than 1 s' if took < 1 else format_time(took)}"


def _rich_progress(stream: TextIO) -> RichProgress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    name = Column(no_wrap=True, overflow="ellipsis", max_width=24)  # the row fits in 80 columns
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=16),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=_console(stream),
        speed_estimate_period=20,
    )


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream)
