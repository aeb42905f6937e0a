"""How long work reports how far it is, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One bar, which several threads may move."""

    def advance(self, amount: int) -> None:
        """Move the bar by `amount` bytes."""

    def close(self) -> None:
        """Take the bar away; it may be closed again."""


class Progress(Protocol):
    """Where bars are shown, several at a time, and lines between them."""

    def task(self, what: str, total: int, done: int = 0) -> Task:
        """A new bar named `what`, full at `total` bytes, of which `done` were there before."""

    def note(self, text: str) -> None:
        """Say something in a line of its own."""


@contextmanager
def running(progress: Progress, what: str, total: int, done: int = 0) -> Iterator[Task]:
    """A bar for as long as the block runs."""
    task = progress.task(what, total, done)
    try:
        yield task
    finally:
        task.close()


class NoProgress:
    """Shows nothing."""

    def task(self, what: str, total: int, done: int = 0) -> Task:
        return _NoTask()

    def note(self, text: str) -> None:
        pass


class _NoTask:
    def advance(self, amount: int) -> None:
        pass

    def close(self) -> None:
        pass
