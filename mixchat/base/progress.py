"""Long work, its progress, and work in a background thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

_T = TypeVar("_T")
Note = Callable[[str], object]  # prints a line
_NOTE_AFTER_S = 1.0


class Task(Protocol):
    """A progress bar, which several threads may move."""

    def advance(self, amount: int) -> None:
        """Move the bar by `amount` bytes."""

    def close(self) -> None:
        """Remove the bar. Closing it again does nothing."""


class Progress(Protocol):
    """Shows several progress bars, and lines between them."""

    def task(self, name: str, total: int, done: int = 0) -> Task:
        """Return a new bar, full at `total` bytes."""

    def note(self, text: str) -> None:
        """Print a line."""


class Reporter(Protocol):
    """Tells a person about work while it runs."""

    def note(self, text: str) -> None:
        """Print a line."""

    def error(self, error: Exception) -> object:
        """Print an error that does not end the work."""

    def status(self, text: str) -> AbstractContextManager[Callable[[str], None]]:
        """Show a text during a block. Yields a function that replaces it."""

    def progress(self) -> AbstractContextManager[Progress]:
        """Show progress bars during a block."""


@contextmanager
def progress_bar(progress: Progress, name: str, total: int, done: int = 0) -> Iterator[Task]:
    """Show a bar named `name` during a block."""
    task = progress.task(name, total, done)
    try:
        yield task
    finally:
        task.close()


class NoProgress:
    """A `Progress` that shows nothing, and its bars."""

    def task(self, name: str, total: int, done: int = 0) -> Task:
        return self

    def note(self, text: str) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def noted_if_slow(note: Note, text: str) -> Iterator[None]:
    """Print `text` if a block takes a second and a person watches."""
    if not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(_NOTE_AFTER_S, note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def waiting_for(path: Path | str, note: Note) -> AbstractContextManager[None]:
    """Note that a file is read if the block takes a second. A pipe may be silent for ever."""
    return noted_if_slow(note, f"reading {path}; Ctrl-C ends it")


def in_background(work: Callable[..., _T], *arguments: object) -> Future[_T]:
    """Start `work` in a daemon thread, which cannot delay the exit."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class QuietReporter:
    """A `Reporter` that tells nothing, for programs."""

    def note(self, text: str) -> None:
        pass

    def error(self, error: Exception) -> None:
        pass

    @contextmanager
    def status(self, text: str) -> Iterator[Callable[[str], None]]:
        yield lambda text: None

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        yield NoProgress()
