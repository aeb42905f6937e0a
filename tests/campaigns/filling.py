"""Fills a disk during a download."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Filling:
    """Fills the disk but for `room` when the share `when` of the weights is made; 0 is at once."""

    def __init__(self, shown: Any, disk: Path, room: int | None, when: float) -> None:
        self.shown, self.disk, self.room, self.when = shown, disk, room, when

    def note(self, text: str) -> None:
        self.shown.note(text)

    def task(self, what: str, total: int, done: int = 0) -> Any:
        task = self.shown.task(what, total, done)
        if what == "quantizing" and self.when:
            bar, count = task, itertools.count()
            made = [done]

            def advance(amount: int) -> None:
                made[0] += amount
                bar.advance(amount)
                if made[0] >= self.when * total and not next(count):
                    self.fill()

            return SimpleNamespace(advance=advance, close=bar.close)
        return task

    def fill(self) -> None:
        if self.room is not None:
            free = shutil.disk_usage(self.disk).free
            with open(self.disk / "filling", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - self.room))
