"""Progress of long work, reported to whatever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Note = Callable[[str], object]  # prints a line that a person should see


class Task(Protocol):
    """A progress bar, which several threads may move."""

    def advance(self, amount: int) -> None:
        """Move the bar by `amount` bytes."""

    def close(self) -> None:
        """Remove the bar; closing it again does nothing."""


class Progress(Protocol):
    """Shows several progress bars at a time, and lines between them."""

    def task(self, what: str, total: int, done: int = 0) -> Task:
        """Return a new bar named `what`, full at `total` bytes, of which `done` are done."""

    def note(self, text: str) -> None:
        """Print a line of its own."""


class Reporter(Protocol):
    """Tells a person about work while it runs."""

    def note(self, text: str) -> None:
        """Print a line that a person should know about."""

    def error(self, error: Exception) -> object:
        """Print an error that does not end the work."""

    def status(self, text: str) -> AbstractContextManager[Callable[[str], None]]:
        """Show a text while a block runs. Yields a function that replaces the text."""

    def progress(self) -> AbstractContextManager[Progress]:
        """Show progress bars while a block runs."""


@contextmanager
def progress_bar(progress: Progress, what: str, total: int, done: int = 0) -> Iterator[Task]:
    """Show a bar named `what` while the block runs."""
    task = progress.task(what, total, done)
    try:
        yield task
    finally:
        task.close()


class NoProgress:
    """A `Progress` that shows nothing."""

    def task(self, what: str, total: int, done: int = 0) -> Task:
        return _NoTask()

    def note(self, text: str) -> None:
        pass


class _NoTask:
    def advance(self, amount: int) -> None:
        pass

    def close(self) -> None:
        pass
