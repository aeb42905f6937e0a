"""Progress bars that fit the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

_WIDE, _NARROW = 80, 56  # columns that show a speed, and those that show bytes
_MIN_BAR, _MAX_BAR = 8, 40  # columns; below 90 columns Rich's own had no bar


class FittingBars(Progress):
    """Adapts its columns when the terminal's width or the names change."""

    def __init__(self, console: Console) -> None:
        # Progress draws its first frame before it has set its own console.
        self._terminal = console
        self._fits = (0, 0)
        super().__init__(console=console, speed_estimate_period=20)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        tasks = list(tasks)
        longest = max((cell_len(task.description) for task in tasks), default=0)
        if self._fits != (self._terminal.width, longest):
            self._fits = (self._terminal.width, longest)
            self.columns = _columns(*self._fits)
        return super().make_tasks_table(tasks)


def _columns(width: int, longest: int) -> tuple[ProgressColumn, ...]:
    """Return the columns of a terminal of `width`, for names of at most `longest` columns."""
    whole = Column(no_wrap=True)
    # Each with its maximum width.
    figures: list[tuple[ProgressColumn, int]] = [(TimeRemainingColumn(table_column=whole), 8)]
    if width >= _WIDE:
        figures.insert(0, (TransferSpeedColumn(table_column=whole), 10))
    if width >= _NARROW:
        figures.insert(0, (DownloadColumn(table_column=whole), 14))
    else:
        figures.insert(0, (TaskProgressColumn(table_column=whole), 4))
    available = width - sum(size + 1 for _, size in figures) - 1
    # A long name is cut before the bar gets shorter than this.
    name_width = max(min(longest, available - _MIN_BAR), 1)
    name = Column(no_wrap=True, overflow="ellipsis", max_width=name_width)
    return (
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=max(min(available - name_width, _MAX_BAR), 1)),
        *(column for column, _ in figures),
    )
