"""A terminal to look at: what a console writes, drawn by an emulator, row by row."""

import io
from functools import cached_property

import pyte
from rich.cells import chop_cells
from rich.console import Console


class Tty(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class Screen(pyte.HistoryScreen):
    """One that never scrolls back, and need not ask at each attribute whether it should."""

    __getattribute__ = object.__getattribute__


class Terminal(io.TextIOBase):
    """A terminal with a `console` that writes to it; `frames` has what was written."""

    encoding = "utf-8"

    def __init__(self, width=60, height=12, colours=None):
        self.frames = []
        self.console = Console(
            file=self,
            force_terminal=True,
            color_system=colours,
            width=width,
            height=height,
            _environ={},
        )
        self._switch_on()

    def _switch_on(self):
        width, height = self.console.size
        self.screen = Screen(width, height, history=100_000, ratio=0.5)
        self._emulator = pyte.Stream(self.screen)

    def write(self, text):
        if text:  # Rich writes nothing while it captures
            self.frames.append(text)
        self._emulator.feed(text.replace("\n", "\r\n"))
        self.__dict__.pop("cells", None)
        return len(text)

    @cached_property
    def cells(self):
        """All rows of history and screen, as they are drawn, without the empty ones at the end."""
        screen, columns = self.screen, range(self.screen.columns)
        rows = [*screen.history.top, *(screen.buffer[y] for y in range(screen.lines))]
        drawn = [[row[x] for x in columns] for row in rows]
        while drawn and all(cell == screen.default_char for cell in drawn[-1]):
            drawn.pop()
        return drawn

    @property
    def rows(self):
        return ["".join(cell.data for cell in row).rstrip() for row in self.cells]

    @property
    def visible(self):
        return [row.rstrip() for row in self.screen.display]

    @property
    def cursor(self):
        """Its row, counted from the first of the history, and its column."""
        return len(self.screen.history.top) + self.screen.cursor.y, self.screen.cursor.x

    @property
    def is_sane(self):
        """The cursor is to be seen, long lines wrap, and colours have ended."""
        cursor = self.screen.cursor
        wraps = pyte.modes.DECAWM in self.screen.mode
        return wraps and not cursor.hidden and cursor.attrs == self.screen.default_char

    def resize(self, width, height, reflows):
        """Cut the rows at the new width, as xterm does, or wrap them, as most others do.

        The cursor stays in its row. If the screen gets too small, rows below the cursor go first.
        """
        (at, _), top, hidden = self.cursor, len(self.screen.history.top), self.screen.cursor.hidden
        rows = self.rows + [""] * (at + 1 - len(self.rows))
        wrapped = [chop_cells(row, width) or [""] for row in rows]
        if not reflows:
            wrapped = [row[:1] for row in wrapped]
        at = sum(map(len, wrapped[:at]))
        rows = [row for parts in wrapped for row in parts]
        rows = rows[: max(min(top, at), at + 1 - height) + height]
        self.console.size = (width, height)
        self._switch_on()
        back = len(rows) - 1 - at
        self.write("\r\n".join(rows).replace("\r", "") + "\r" + (f"\x1b[{back}A" if back else ""))
        self.write("\x1b[?25l" if hidden else "")
