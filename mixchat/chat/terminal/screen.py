"""The screen of a chat, which shows notes, the progress of prompt processing, and answers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, TextIO, cast

from mixchat.base.quantities import format_time
from mixchat.base.sanitize import sanitize
from mixchat.chat import printing, theme
from mixchat.chat.printing import left_out_note, thought_note
from mixchat.face.events import End, LeftOut, Piece, Reading

if TYPE_CHECKING:
    from rich.console import Console

    from mixchat.chat.draw.markdown_stream import MarkdownStream
    from mixchat.face.events import Event
    from mixchat.text.messages import Message

_PROGRESS_DELAY_S = 1.0  # before progress is shown
_PROGRESS_INTERVAL_S = 0.1  # between two updates of it
_LONG_WAIT_S = 3.0  # is announced
_STATUS_INTERVAL_S = 0.5  # between two status lines below an answer
_ERASE = "\r\x1b[K"
_MAX_QUESTION_LINES = 12  # a longer question is shown by its first and last lines
_FIRST_LINES, _LAST_LINES = 5, 4


class Screen:
    """Writes to `out`. With `raw`, answers are shown as they are written, not as Markdown.

    No control character of any text reaches the terminal.
    """

    def __init__(
        self,
        out: TextIO | None = None,
        *,
        raw: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.out, self.raw = out or sys.stdout, raw
        self._clock = clock
        self._waiting: _WaitingLine | None = None
        self._answer: MarkdownStream | _PlainWriter | None = None  # that is being shown
        self._thought = 0  # tokens of the last thinking
        self._terminal = self.out.isatty() and os.environ.get("TERM") != "dumb"

    def say(self, text: str = "") -> None:
        """Show one line or several, broken between words if the terminal is too narrow."""
        printing.say(*text.split("\n"), stream=self.out)

    @property
    def width(self) -> int | None:
        """Return the columns of the terminal, None without one."""
        return printing.columns(self.out) if self._terminal else None

    def show(
        self,
        events: Iterator[Event],
        earlier: str = "",
        below: Callable[[], str] = str,
        *,
        shows_thinking: bool = True,
        expected: Callable[[int], float | None] = lambda tokens: None,
    ) -> End:
        """Show an answer as it comes. Returns its last event. Leaves the cursor at a new line.

        `earlier` is the part of an answer that is continued. It is not shown again. `below` returns
        a line to show below the text while the text is drawn, or nothing. Thinking that is shown
        leaves a line with its length. `expected` returns the seconds that a prompt of so many
        tokens takes. Many seconds are shown at first.
        """
        waiting = self._waiting = _WaitingLine(self.out, self._clock, self._terminal, expected)
        writer = self._answer = self._writer(earlier, below)
        thinking = self._thinking_writer(below) if shows_thinking and self._terminal else None
        try:
            with closing(cast("Generator[Event, None, None]", events)):
                for event in events:
                    if isinstance(event, Reading):
                        waiting.update(event.done, event.total)
                    elif isinstance(event, LeftOut):
                        waiting.erase()
                        self.say(f"({left_out_note(event.turns)})")
                    elif isinstance(event, End):
                        return event
                    elif event.text:
                        if event.thinking:
                            self._think(event, thinking)
                        waiting.erase()
                        self._begin(writer)
                        writer.feed(event.text)
                    else:
                        self._think(event, thinking)
        finally:
            self._erase_waiting()
            self._waiting = None
            self._begin(writer)
            self._answer = None
            writer.close()
        raise AssertionError("every answer ends with End")

    def _begin(self, writer: MarkdownStream | _PlainWriter) -> None:
        """Let `writer` be the one that shows, and end the thinking before."""
        if self._answer is not writer and self._answer is not None:
            self._answer.close()
        self._answer = writer

    def _think(self, event: Piece, writer: MarkdownStream | _PlainWriter | None) -> None:
        self._thought = event.thinking_tokens
        if writer is not None:
            self._erase_waiting()
            self._answer = writer
            writer.feed(event.thinking)
        elif self._waiting is not None:
            self._waiting.think(event.thinking_tokens)

    def pause(self) -> None:
        """Leave the terminal in order while the program is suspended."""
        self._erase_waiting()
        if self._answer is not None:
            self._answer.pause()

    def show_turns(self, messages: Iterable[Message]) -> None:
        """Show questions and answers of a resumed chat."""
        for message in messages:
            if message.role == "user":
                self._show_question(message.content)
                continue
            if message.thinking_tokens:
                self.say(f"({thought_note(message.thinking_tokens)})")
            self._show_whole(message.content)
            self.say("(unfinished; /continue resumes it)\n" if message.partial else "")

    def _show_question(self, text: str) -> None:
        """Show a question as it was typed, of a long one the first and last lines."""
        lines = text.splitlines() or [""]
        if len(lines) > _MAX_QUESTION_LINES:
            hidden = len(lines) - _FIRST_LINES - _LAST_LINES
            lines[_FIRST_LINES:-_LAST_LINES] = [f"({hidden:,} more lines)"]
        marks = [">>>", *["..."] * (len(lines) - 1)]
        printing.draw("\n".join(map(self._question_line, marks, lines)), self.out)

    def _question_line(self, mark: str, line: str) -> str:
        words = theme.painted(sanitize(line), theme.WORDS, self.out)
        return f"{theme.painted(mark, theme.PROMPT, self.out)} {words}"

    def _show_whole(self, text: str) -> None:
        if not self._draws:
            printing.show(sanitize(f"{text}\n"), self.out)
            return
        from mixchat.chat.draw.markdown import MarkdownText

        self._console().print(MarkdownText(text))

    @property
    def _draws(self) -> bool:
        return self._terminal and not self.raw

    def _writer(self, earlier: str, below: Callable[[], str]) -> MarkdownStream | _PlainWriter:
        if not self._draws:
            return _PlainWriter(self.out)
        from mixchat.chat.draw.markdown_stream import MarkdownStream

        below = _TwiceASecond(below, self._clock)
        return MarkdownStream(self._console(), before=earlier, below=below)

    def _thinking_writer(self, below: Callable[[], str]) -> MarkdownStream | _PlainWriter:
        def note() -> str:
            return f"({thought_note(self._thought)})"

        if not self._draws:
            return _FaintWriter(self.out, note)
        from mixchat.chat.draw.markdown_stream import ThinkingStream

        below = _TwiceASecond(below, self._clock)
        return ThinkingStream(self._console(), below=below, note=note)

    def _console(self) -> Console:
        from rich.console import Console

        return Console(file=self.out, highlight=False)

    def _erase_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.erase()


class _WaitingLine:
    """The line `reading 1,234 of 8,000 tokens (15%), about 40 s left`, shown after a second.

    If it is expected to take long, `reading 8,000 tokens, about 47 s` is shown at once. So is
    `waiting for the server`, until the server tells how far it is.
    """

    def __init__(
        self,
        out: TextIO,
        clock: Callable[[], float],
        terminal: bool,
        expected: Callable[[int], float | None],
    ) -> None:
        self._out, self._clock, self._terminal = out, clock, terminal
        self._expected = expected
        self._started = clock()
        self._next = self._started + _PROGRESS_DELAY_S
        self._shown = False

    def update(self, done: int, total: int) -> None:
        if not self._terminal:
            return
        if total == 0:
            self._write("waiting for the server")
            return
        if done == 0:
            self._announce(total)
            return
        now = self._clock()
        if now < self._next:
            return
        self._next = now + _PROGRESS_INTERVAL_S
        left = (now - self._started) * (total - done) / done
        more = f", about {format_time(left)} left" if left >= _LONG_WAIT_S else ""
        self._write(f"reading {done:,} of {total:,} tokens ({done / total:.0%}){more}")

    def think(self, tokens: int) -> None:
        """Show the progress of a thinking that is hidden."""
        now = self._clock()
        if self._terminal and now >= self._next:
            self._next = now + _PROGRESS_INTERVAL_S
            self._write(f"thinking, {tokens:,} tokens")

    def _announce(self, tokens: int) -> None:
        seconds = self._expected(tokens)
        self._started = self._clock()
        if seconds is not None and seconds >= _LONG_WAIT_S:
            self._next = self._started + _PROGRESS_DELAY_S  # time to read it
            self._write(f"reading {tokens:,} tokens, about {format_time(seconds)}")

    def _write(self, text: str) -> None:
        self._shown = True
        self._out.write(_ERASE + text[: printing.columns(self._out) - 1])
        self._out.flush()

    def erase(self) -> None:
        if self._shown:
            self._shown = False
            self._out.write(_ERASE)
            self._out.flush()


class _TwiceASecond:
    """A line that is made again twice a second, so that it can be read and costs little."""

    def __init__(self, make: Callable[[], str], clock: Callable[[], float]) -> None:
        self._make, self._clock = make, clock
        self._line, self._next = "", clock()

    def __call__(self) -> str:
        if (now := self._clock()) >= self._next:
            self._line, self._next = self._make(), now + _STATUS_INTERVAL_S
        return self._line


class _PlainWriter:
    """Shows an answer as it is written."""

    style = ""

    def __init__(self, out: TextIO) -> None:
        self._out, self._at_line_start = out, True

    def feed(self, text: str) -> None:
        clean = sanitize(text)
        self._out.write(theme.painted(clean, self.style, self._out) if self.style else clean)
        self._out.flush()
        if clean:
            self._at_line_start = clean.endswith("\n")

    def pause(self) -> None:
        """Do nothing, because all that was written stays."""

    def close(self) -> None:
        if not self._at_line_start:
            self._out.write("\n")
            self._out.flush()


class _FaintWriter(_PlainWriter):
    """Shows a thinking as it is written, then `note()`."""

    style = theme.THINKING

    def __init__(self, out: TextIO, note: Callable[[], str]) -> None:
        super().__init__(out)
        self._note = note

    def close(self) -> None:
        super().close()
        self._out.write(f"{theme.painted(self._note(), self.style, self._out)}\n\n")
        self._out.flush()
