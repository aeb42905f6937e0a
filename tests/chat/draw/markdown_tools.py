"""Streams a text to a terminal, and compares what it leaves there."""

import os
from contextlib import closing

from screens import Terminal

from mixchat.chat.draw.markdown import MarkdownText
from mixchat.chat.draw.markdown_stream import MarkdownStream

# A campaign sets it to more: MARKDOWN_TEXTS=5000 pytest tests/chat/draw/test_markdown.py
TEXTS = int(os.environ.get("MARKDOWN_TEXTS", "80"))


def pieces(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


class Clock:
    """A clock that is set by hand; with `cost`, writing to `terminal` takes so many seconds."""

    def __init__(self, terminal=None, cost=0.0):
        self.now, self.cost = 0.0, cost
        if terminal:
            self._write, terminal.write = terminal.write, self.write

    def __call__(self):
        return self.now

    def write(self, text):
        self.now += self.cost * bool(text)
        return self._write(text)


class Eager(MarkdownStream):
    """A stream that has time to draw at each piece."""

    def __init__(self, console, earlier=""):
        self.clock = Clock()
        super().__init__(console, earlier=earlier, clock=self.clock)

    def feed(self, text, draws=True):
        self.clock.now += draws
        super().feed(text)


def streamed(terminal, parts, frames=4):
    """The terminal with a text that came in pieces, of which some were drawn."""
    with closing(Eager(terminal.console)) as stream:
        for i, part in enumerate(parts):
            stream.feed(part, draws=i * frames // len(parts) != (i - 1) * frames // len(parts))
    return terminal


def printed(text, *terminal):
    """The terminal with the whole text."""
    terminal = Terminal(*terminal)
    terminal.console.print(MarkdownText(text))
    return terminal


def assert_same(terminal, reference):
    assert terminal.rows == reference.rows
    assert terminal.cells == reference.cells  # with their colours
    assert terminal.cursor == reference.cursor
    assert terminal.is_sane


def rows_of(text, width=60):
    return printed(text, width, 50).rows
