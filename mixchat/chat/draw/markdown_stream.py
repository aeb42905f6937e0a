"""Shows Markdown in a terminal while it is being written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import SegmentLines
from rich.text import Text

from mixchat.base import interrupts
from mixchat.chat.draw.markdown import MarkdownBlock, blocks, cleaned

_MAX_DRAWING_SHARE = 0.1  # of the time
_MIN_FRAME_INTERVAL_S = 0.03
# No frame is drawn so long after the window's size has changed. While it is being changed, tmux
# reports a new size as late as this, and a tail for the old one might not fit.
_RESIZE_PAUSE_S = 0.3

# A terminal that knows mode 2026 shows all of a frame at once.
_BEGIN = "\x1b[?2026h"
_END = "\x1b[?2026l"
# Without mode 7 no line of the tail takes two rows, even if Rich and the terminal disagree on a
# character's width.
_NO_WRAP = "\x1b[?7l"
_WRAP = "\x1b[?7h"
_FAINT = "\x1b[2m"
_NO_LONGER_FAINT = "\x1b[22m"
_HIDE_CURSOR = "\x1b[?25l"
_SHOW_CURSOR = "\x1b[?25h"
# It starts at the second column. At the top of the screen, tmux takes the first column for clearing
# the screen, and copies the old content to its history.
_ERASE_BELOW = "\r\x1b[K\x1b[C\x1b[J\r"


class MarkdownStream:
    """Draws the text it is fed. When it is closed, the screen shows what `MarkdownText` shows.

    Text that cannot change any more is printed once. In a terminal the tail is below it, cut to the
    screen's height. Between frames the hidden cursor is at the start of the tail, so after any
    resizing the rows from the cursor on are the tail. Nothing else may write before `close`.

    `earlier` is the text that the fed text continues. If it ends within code, the drawing starts
    with that block. `below` returns a line to show faintly below the tail, or nothing.
    """

    def __init__(
        self,
        console: Console,
        *,
        earlier: str = "",
        below: Callable[[], str] = str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._console = console
        self._clock = clock
        self._has_tail = console.is_terminal and not console.is_dumb_terminal
        self._earlier = earlier
        self._below = below
        self._rest = ""  # the text that can still change
        self._gap = False  # a blank line comes before the rest
        self._lacks_frame = False  # the line above the code of the rest is on the screen already
        self._shown: tuple[list[str], ConsoleOptions] | None = None
        self._next_frame = clock()
        self._size = console.size

    def feed(self, text: str) -> None:
        """Take the next piece, and draw unless too much time was spent on drawing."""
        if self._earlier and text:
            earlier = cleaned(self._earlier, self._console.encoding)
            self._earlier = ""
            last = blocks(earlier)[-1:]
            self._rest = earlier.split("\n", last[0].start)[-1] if last and last[0].is_open else ""
        self._rest += cleaned(text, self._console.encoding)
        started = self._clock()
        if started < self._next_frame:
            return
        if (size := self._console.size) != self._size:
            self._size = size
            self._next_frame = started + _RESIZE_PAUSE_S
            return
        with interrupts.deferred():  # no half frame, and none that is drawn twice
            options = self._console.options
            final = self._settled()
            tail = list[str]()
            if self._has_tail:
                line = self._below()
                tail = [*self._tail_rows(), *([_faint(line)] if line else [])]
                # A tail as high as the screen would scroll its first row out of reach.
                tail = tail[-max(options.size.height - 1, 1) :]
            if final or self._shown != (tail, options):
                up = f"\x1b[{len(tail) - 1}A" if len(tail) > 1 else ""
                new_tail = _NO_WRAP + "\n".join(tail) + "\r" + up + _WRAP
                self._write(final, begin=_HIDE_CURSOR, after=new_tail)
            self._shown = tail, options
        now = self._clock()
        self._next_frame = now + max(
            _MIN_FRAME_INTERVAL_S, (now - started) * (1 / _MAX_DRAWING_SHARE - 1)
        )

    def pause(self) -> None:
        """Erase the tail until more is fed, because something else is about to write."""
        if self._shown is not None:
            self._write([], after=_SHOW_CURSOR)
            self._shown = None

    def close(self) -> None:
        """Draw all that is left, and leave the cursor at the start of a line."""
        with interrupts.deferred():  # no half frame, and none that is drawn twice
            self._write(self._tail_rows(), after=_SHOW_CURSOR)

    def _settled(self) -> list[str]:
        """Return the rows that have become final, and take their text from the rest.

        Only the last block of the complete lines can still change, and the end of long code.
        """
        complete = self._blocks(self._rest[: self._rest.rfind("\n") + 1])
        if not complete:
            return []
        *final, last = complete
        rows = self._rows(final)
        if final:
            self._rest = self._rest.split("\n", last.start)[-1]
            self._gap = last.gap
            self._lacks_frame = False
        if not last.is_open or last.tokens[0].type != "fence":
            return rows
        # Code above the screen is final up to a blank line. The lines after it get the same
        # colours, unless the blank line is within a string.
        fence, *lines = self._rest.split("\n")
        above = lines[: -self._console.height]
        if "" in above:
            size = len(above) - above[::-1].index("")
            rows += self._rows(self._blocks("\n".join([fence, *above[:size], ""])))[:-1]
            self._rest = "\n".join([fence, *lines[size:]])
            self._gap = False
            self._lacks_frame = True
        return rows

    def _blocks(self, text: str) -> list[MarkdownBlock]:
        """Return the blocks of the beginning of the rest."""
        drawn = blocks(text)
        return [replace(drawn[0], gap=self._gap), *drawn[1:]] if drawn else []

    def _tail_rows(self) -> list[str]:
        return self._rows(self._blocks(self._rest))

    def _rows(self, drawn: Iterable[MarkdownBlock]) -> list[str]:
        rows = self._rendered(drawable for block in drawn for drawable in block.parts)
        return rows[self._lacks_frame :]

    def _rendered(self, drawables: Iterable[RenderableType]) -> list[str]:
        lines = [line for each in drawables for line in self._console.render_lines(each, pad=False)]
        with self._console.capture() as capture:
            self._console.print(SegmentLines(lines, new_lines=True), soft_wrap=True, end="")
        return capture.get().split("\n")[:-1]

    def _write(self, final: list[str], begin: str = "", after: str = "") -> None:
        """Write a frame in one piece, final rows in place of the tail, then a new tail."""
        frame = "".join(f"{row}\n" for row in final)
        if self._has_tail:
            frame = f"{_BEGIN}{begin}{_ERASE_BELOW}{frame}{after}{_END}"
        encoding = self._console.encoding
        self._console.file.write(frame.encode(encoding, "replace").decode(encoding))
        self._console.file.flush()


class ThinkingStream(MarkdownStream):
    """Draws the end of a thinking faintly, as it is written. `close` puts `note()` in its place."""

    def __init__(
        self, console: Console, *, below: Callable[[], str], note: Callable[[], str]
    ) -> None:
        super().__init__(console, below=below)
        self._note = note

    def _settled(self) -> list[str]:
        size = self._console.size
        self._rest = self._rest[-size.height * size.width :]  # all that fits
        return []

    def _tail_rows(self) -> list[str]:
        return self._rendered([Text(self._rest.rstrip("\n"), "dim")])

    def close(self) -> None:
        with interrupts.deferred():
            self._write([_faint(self._note()), ""], after=_SHOW_CURSOR)


def _faint(line: str) -> str:
    return f"{_FAINT}{line}{_NO_LONGER_FAINT}"
