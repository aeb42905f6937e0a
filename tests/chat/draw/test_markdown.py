"""Answers in Markdown: what a terminal shows of them, whole and while they come in pieces."""

import itertools
import random
import re
from contextlib import closing

import pytest
from markdown_texts import markdown
from markdown_tools import TEXTS, Clock, Eager, assert_same, pieces, printed, streamed
from screens import Terminal

from mixchat.chat.draw.markdown_stream import MarkdownStream

SIZES = (1, 2, 3, 5, 8, 13, 21, 34, 55, 10**6)
HEIGHTS = (3, 12, 400)
WIDTHS = (10, 24, 60, 100)


@pytest.mark.parametrize("batch", range(20))
def test_a_streamed_text_looks_as_if_it_had_been_printed_whole(batch):
    for seed in range(batch, TEXTS, 20):
        text, width = markdown(seed), WIDTHS[seed // 20 % len(WIDTHS)]
        colours = "truecolor" if seed % 3 == 0 else None
        reference = printed(text, width, 20, colours)
        for i, height in enumerate(HEIGHTS):
            size = SIZES[(seed // 20 + i) % len(SIZES)]
            terminal = streamed(Terminal(width, height, colours), pieces(text, size))
            if height < max(HEIGHTS):  # code above the screen is coloured by itself
                assert (terminal.rows, terminal.cursor) == (reference.rows, reference.cursor)
            else:
                assert_same(terminal, reference)


@pytest.mark.parametrize(
    "text",
    [
        *("- a\n+", "- a\n-", "- a\n--- b", "a\n- b", "a\n===\nb", "a\n| b |\n|---|\n| c |\nd"),
        *("- a\n\n\n- b\n\n  c\n\n\n  d", "1. a\n2", "1. a\n2. b\n3) c", "```\na\n``"),
        *("```\n\n\n", "> a\nb\n\n> c\n>\n> d", "\n\n \na", ""),
    ],
)
def test_what_the_next_letter_changes_is_not_yet_final(text):
    reference = printed(text, 20, 8)
    assert_same(streamed(Terminal(20, 8), text, frames=1000), reference)


def test_no_row_is_shown_twice_while_a_text_grows():
    words = [f"w{i:03}" for i in range(400)]
    terminal = Terminal(30, 6)
    with closing(Eager(terminal.console)) as stream:
        for i, word in enumerate(words):
            stream.feed(word + (" " if i % 7 else "\n\n" if i % 3 else "\n- "))
            shown = re.findall(r"w\d{3}", "".join(terminal.rows))
            assert shown == sorted(set(shown))
    assert re.findall(r"w\d{3}", "".join(terminal.rows)) == words


def numbered(seed, words_a_line):
    """A text of all kinds of blocks, of words with numbers."""
    made, numbers = random.Random(seed), itertools.count()

    def line():
        return " ".join(f"w{next(numbers):03}" for _ in range(made.randint(1, words_a_line)))

    parts = []
    for _ in range(12):
        lines = [line() for _ in range(made.randint(1, 12))]
        kind = made.randrange(4)
        start = ("", "- ", "> ", "")[kind]
        text = "\n".join(start + each for each in lines)
        parts.append(f"```\n{text}\n```" if kind == 3 else text)
    return "\n\n".join(parts), next(numbers)


@pytest.mark.parametrize("reflows", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_resizing_loses_and_repeats_nothing(seed, reflows):
    # Text that xterm cuts off is gone: there the words fit into the smallest width.
    text, count = numbered(seed, 20 if reflows else 1)
    made, terminal = random.Random(seed), Terminal(40, 12)
    with closing(Eager(terminal.console)) as stream:
        for part in pieces(text, made.choice([10, 20, 50])):
            stream.feed(part)
            if made.random() < 0.2:
                terminal.resize(made.randint(10, 60), made.randint(3, 30), reflows)
                shown = re.findall(r"w\d{3}", "".join(terminal.rows))
                assert shown == sorted(set(shown))
    assert re.findall(r"w\d{3}", "".join(terminal.rows)) == [f"w{i:03}" for i in range(count)]


def test_no_frame_is_drawn_while_the_window_is_being_resized():
    """tmux tells of the new size up to a quarter of a second late."""
    terminal, clock = Terminal(40, 20), Clock()
    with closing(MarkdownStream(terminal.console, clock=clock)) as stream:
        for i in range(100):
            clock.now += 0.04
            before = len(terminal.frames)
            stream.feed(f"word{i} ")
            drawn = len(terminal.frames) > before
            assert drawn or 20 < i < 75
            assert not drawn or not 20 < i < 60
            if 20 <= i < 60 and i % 4 == 0:
                terminal.resize(40 - i // 4, 20 - i // 4, reflows=True)
    assert len(re.findall(r"word\d+ ", " ".join(terminal.rows) + " ")) == 100


def test_a_frame_is_written_in_one_piece_that_the_terminal_shows_at_once():
    parts = pieces(markdown(3), 10)
    frames = streamed(Terminal(), parts, frames=len(parts)).frames
    assert len(frames) <= len(parts) + 1
    for frame in frames:
        assert re.findall(r"\x1b\[\?2026.|$", frame) == ["\x1b[?2026h", "\x1b[?2026l", ""]
        assert frame.startswith("\x1b[?2026h")
        assert frame.endswith("\x1b[?2026l")


def test_nothing_is_written_when_nothing_has_changed():
    terminal = Terminal()
    with closing(Eager(terminal.console)) as stream:
        stream.feed("one")
        before = len(terminal.frames)
        stream.feed("")
        stream.feed(" ")
        assert len(terminal.frames) == before


def test_code_scrolls_into_the_history_before_it_ends():
    terminal = Terminal(60, 10)
    with closing(Eager(terminal.console)) as stream:
        stream.feed("```python\n")
        for i in range(500):
            stream.feed(f"x{i} = {i}\n" + "\n" * (i % 9 == 0), draws=i % 20 == 0)
        history = terminal.rows[: len(terminal.screen.history.top)]
        assert "x300 = 300" in history
