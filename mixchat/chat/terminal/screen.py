"""The screen of a chat, which shows notes, the progress of prompt processing, and answers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, TextIO, TypeAlias, cast

from mixchat.base.quantities import format_time
from mixchat.base.sanitize import sanitize
from mixchat.chat import printing
from mixchat.chat.printing import (
    PROMPT,
    THINKING,
    WORDS,
    left_out_note,
    one_line,
    painted,
    thought_note,
)
from mixchat.chat.tools.toolbox import ToolStart
from mixchat.face.events import End, LeftOut, Piece, Reading, ToolResult

if TYPE_CHECKING:
    from rich.console import Console

    from mixchat.chat.draw.markdown_stream import MarkdownStream
    from mixchat.chat.session import ChatEvent
    from mixchat.text.messages import Message
    from mixchat.text.tool_call import ToolCall

_PROGRESS_DELAY_S = 1.0  # before progress is shown
_PROGRESS_INTERVAL_S = 0.1  # between two updates of it
_LONG_WAIT_S = 3.0  # is announced
_STATUS_INTERVAL_S = 0.5  # between two status lines below an answer
_ERASE = "\r\x1b[K"
_MAX_QUESTION_LINES = 12  # a longer question is shown by its first and last lines
_FIRST_LINES = 5
_LAST_LINES = 4
_MAX_ARGUMENTS = 600  # characters of a call
_MAX_RESULT = 200  # characters of a tool's result


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
        self.out = out or sys.stdout
        self.raw = raw
        self._clock = clock
        self._waiting: _WaitingLine | None = None
        self._writer: _Writer | None = None  # that is showing something
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
        events: Iterator[ChatEvent],
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
        thinks = shows_thinking and self._terminal
        answer = self._writer = self._new_writer(below, earlier)
        thinking = self._thinking_writer(below) if thinks else None
        try:
            # An iterator that is left open goes on computing until it is collected.
            with closing(cast("Generator[ChatEvent, None, None]", events)):
                for event in events:
                    if isinstance(event, Reading):
                        waiting.update(event.done, event.total)
                    elif isinstance(event, LeftOut):
                        waiting.erase()
                        self.say(f"({left_out_note(event.turns)})")
                    elif isinstance(event, End):
                        return event
                    elif isinstance(event, ToolStart):
                        waiting.erase()
                        self._begin_answer(answer)
                        self._writer = None
                        answer.close()
                        self.say_call(event.call)
                    elif isinstance(event, ToolResult):
                        self.say_result(event.text)
                        answer = self._writer = self._new_writer(below)
                        thinking = self._thinking_writer(below) if thinks else None
                    else:
                        self._show_piece(event, waiting, answer, thinking)
        finally:
            waiting.erase()
            self._waiting = None
            if self._writer is not None:  # none while a tool runs
                self._begin_answer(answer)
                self._writer = None
                answer.close()
        raise AssertionError("every answer ends with End")

    def _thinking_writer(self, below: Callable[[], str]) -> _Writer:
        return self._new_writer(below, note=lambda: f"({thought_note(self._thought)})")

    def say_call(self, call: ToolCall) -> None:
        """Show a call of a tool with the beginning of its arguments."""
        self.say(call_line(call))

    def say_result(self, text: str) -> None:
        """Show the beginning of a tool's result, and its length."""
        beginning = one_line(text[:_MAX_RESULT])
        more = f"... ({len(text):,} characters)" if len(text) > _MAX_RESULT else ""
        self.say(f"[result] {beginning}{more}\n")

    def _show_piece(
        self, piece: Piece, waiting: _WaitingLine, answer: _Writer, thinking: _Writer | None
    ) -> None:
        if piece.thinking or not piece.text:
            self._thought = piece.thinking_tokens
            if thinking is None:
                waiting.think(piece.thinking_tokens)
            else:
                waiting.erase()
                self._writer = thinking
                thinking.feed(piece.thinking)
        if piece.text:
            waiting.erase()
            self._begin_answer(answer)
            answer.feed(piece.text)

    def _begin_answer(self, answer: _Writer) -> None:
        """Let the answer be shown, and end the thinking before it."""
        if self._writer is not answer and self._writer is not None:
            self._writer.close()
        self._writer = answer

    def pause(self) -> None:
        """Leave the terminal in order while the program is suspended."""
        if self._waiting is not None:
            self._waiting.erase()
        if self._writer is not None:
            self._writer.pause()

    def show_turns(self, messages: Iterable[Message]) -> None:
        """Show questions as they were typed and answers of a resumed chat."""
        for message in messages:
            if message.role == "user":
                lines = message.content.splitlines() or [""]
                if len(lines) > _MAX_QUESTION_LINES:
                    hidden = len(lines) - _FIRST_LINES - _LAST_LINES
                    lines[_FIRST_LINES:-_LAST_LINES] = [f"({hidden:,} more lines)"]
                for number, line in enumerate(lines):
                    mark = painted("..." if number else ">>>", PROMPT, self.out)
                    printing.draw(f"{mark} {painted(sanitize(line), WORDS, self.out)}\n", self.out)
                continue
            if message.role == "tool":
                self.say_result(message.content)
                continue
            if message.thinking_tokens:
                self.say(f"({thought_note(message.thinking_tokens)})")
            if self._terminal and not self.raw:
                from mixchat.chat.draw.markdown import MarkdownText

                self._console().print(MarkdownText(message.content))
            else:
                printing.show(sanitize(f"{message.content}\n"), self.out)
            for call in message.calls:
                self.say_call(call)
            self.say("(unfinished; /continue resumes it)\n" if message.partial else "")

    def _new_writer(
        self, below: Callable[[], str], earlier: str = "", note: Callable[[], str] | None = None
    ) -> _Writer:
        """Return the writer of an answer, or of a thinking that ends with a `note`."""
        if not self._terminal or self.raw:
            return _PlainWriter(self.out, note)
        # Rich's Markdown is slow to load.
        from mixchat.chat.draw.markdown_stream import MarkdownStream, ThinkingStream

        line = ""
        due = self._clock()
        clock = self._clock

        def twice_a_second() -> str:
            nonlocal line, due
            if (now := clock()) >= due:  # so that it can be read, and costs little
                line = below()
                due = now + _STATUS_INTERVAL_S
            return line

        if note is None:
            console = self._console()
            return MarkdownStream(console, earlier=earlier, below=twice_a_second, clock=clock)
        return ThinkingStream(self._console(), below=twice_a_second, note=note)

    def _console(self) -> Console:
        from rich.console import Console

        return Console(file=self.out, highlight=False)


def call_line(call: ToolCall) -> str:
    """Return the line that shows a call of a tool."""
    arguments = one_line(call.arguments)
    hidden = len(arguments) - _MAX_ARGUMENTS
    more = f"... ({hidden:,} more characters)" if hidden > 0 else ""
    return f"[tool] {one_line(call.name)} {arguments[:_MAX_ARGUMENTS]}{more}"


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
        self._out = out
        self._clock = clock
        self._terminal = terminal
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
            seconds = self._expected(total)
            now = self._started = self._clock()
            if seconds is not None and seconds >= _LONG_WAIT_S:
                self._next = now + _PROGRESS_DELAY_S  # time to read it
                self._write(f"reading {total:,} tokens, about {format_time(seconds)}")
            return
        now = self._clock()
        if now < self._next:
            return
        self._next = now + _PROGRESS_INTERVAL_S
        seconds = (now - self._started) * (total - done) / done
        more = f", about {format_time(seconds)} left" if seconds >= _LONG_WAIT_S else ""
        self._write(f"reading {done:,} of {total:,} tokens ({done / total:.0%}){more}")

    def think(self, tokens: int) -> None:
        """Show the progress of a thinking that is hidden."""
        now = self._clock()
        if self._terminal and now >= self._next:
            self._next = now + _PROGRESS_INTERVAL_S
            self._write(f"thinking, {tokens:,} tokens")

    def _write(self, text: str) -> None:
        self._shown = True
        # In the last column some terminals wrap, and `\r` would return to the second row.
        self._out.write(_ERASE + text[: printing.columns(self._out) - 1])
        self._out.flush()

    def erase(self) -> None:
        if self._shown:
            self._shown = False
            self._out.write(_ERASE)
            self._out.flush()


class _PlainWriter:
    """Shows an answer as it is written, or faintly a thinking, and then its `note()`."""

    def __init__(self, out: TextIO, note: Callable[[], str] | None = None) -> None:
        self._out = out
        self._note = note
        self._at_line_start = True

    def feed(self, text: str) -> None:
        clean = sanitize(text)
        self._out.write(clean if self._note is None else painted(clean, THINKING, self._out))
        self._out.flush()
        if clean:
            self._at_line_start = clean.endswith("\n")

    def pause(self) -> None:
        """Do nothing, because all that was written stays."""

    def close(self) -> None:
        end = "" if self._at_line_start else "\n"
        if self._note is not None:
            end += f"{painted(self._note(), THINKING, self._out)}\n\n"
        self._out.write(end)
        self._out.flush()


_Writer: TypeAlias = "MarkdownStream | _PlainWriter"
