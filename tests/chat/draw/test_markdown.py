"""Answers in Markdown: what a terminal shows of them, whole and while they come in pieces."""

import io
import itertools
import os
import random
import re
import signal
from collections import Counter
from contextlib import closing

import pytest
from markdown_texts import CODE, fence, items, markdown, paragraph, table
from rich.console import Console
from screens import Terminal

from mixchat.base.sanitize import sanitize
from mixchat.chat.draw import markdown_stream
from mixchat.chat.draw.markdown import render
from mixchat.chat.draw.markdown_stream import MarkdownStream

# A campaign sets it to more: MARKDOWN_TEXTS=5000 pytest tests/chat/draw/test_markdown.py
TEXTS = int(os.environ.get("MARKDOWN_TEXTS", "200"))
SIZES = (1, 2, 3, 5, 8, 13, 21, 34, 55, 10**6)
HEIGHTS = (3, 12, 40)
WIDTHS = (10, 24, 60, 100)


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

    def __init__(self, console, before=""):
        self.clock = Clock()
        super().__init__(console, before=before, clock=self.clock)

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
    terminal.console.print(render(text))
    return terminal


def assert_same(terminal, reference):
    assert terminal.rows == reference.rows
    assert terminal.cells == reference.cells  # with their colours
    assert terminal.cursor == reference.cursor
    assert terminal.is_sane


def rows_of(text, width=60):
    return printed(text, width, 50).rows


@pytest.mark.parametrize("batch", range(20))
def test_a_streamed_text_looks_as_if_it_had_been_printed_whole(batch):
    for seed in range(batch, TEXTS, 20):
        text, width = markdown(seed), WIDTHS[seed // 20 % len(WIDTHS)]
        colours = "truecolor" if seed % 3 == 0 else None
        reference = printed(text, width, 20, colours)
        for i, height in enumerate(HEIGHTS):
            size = SIZES[(seed // 20 + i) % len(SIZES)]
            assert_same(streamed(Terminal(width, height, colours), pieces(text, size)), reference)


@pytest.mark.parametrize("make", [paragraph, fence, items, table])
def test_every_piece_may_be_drawn(make):
    text = "\n\n".join(make(random.Random(seed)) for seed in range(3))
    terminal = streamed(Terminal(40, 5), pieces(text, 2), frames=10**4)
    assert_same(terminal, printed(text, 40, 5))


@pytest.mark.parametrize(
    "text",
    [
        "- a\n+",
        "- a\n-",
        "- a\n--- b",
        "a\n- b",
        "a\n===\nb",
        "a\n| b |\n|---|\n| c |\nd",
        "- a\n\n\n- b\n\n  c\n\n\n  d",
        "1. a\n2",
        "1. a\n2. b\n3) c",
        "```\na\n``",
        "```\n\n\n",
        "> a\nb\n\n> c\n>\n> d",
        "\n\n \na",
        "",
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
@pytest.mark.parametrize("seed", range(4))
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
            stream.feed(f"x{i} = {i}\n", draws=i % 20 == 0)
        history = terminal.rows[: len(terminal.screen.history.top)]
        assert "x300 = 300" in history


@pytest.mark.parametrize(("cost", "expected"), [(0.001, 1 / 31), (0.05, 0.1), (2.0, 0.1)])
def test_drawing_takes_a_tenth_of_the_time(cost, expected):
    terminal = Terminal()
    clock = Clock(terminal, cost)
    stream = MarkdownStream(terminal.console, clock=clock)
    for i in range(1500):
        stream.feed(f"{i} ")
        clock.now += cost / 3
    share = len(terminal.frames) * cost / clock.now
    assert share == pytest.approx(expected, rel=0.15)


def test_a_long_answer_costs_in_proportion_to_its_length(monkeypatch):
    parsed = []
    blocks = markdown_stream.blocks
    monkeypatch.setattr(
        markdown_stream, "blocks", lambda text: parsed.append(len(text)) or blocks(text)
    )
    text = "".join(f"- item {i}\n\nparagraph {i}\n\n" for i in range(300))
    streamed(Terminal(), pieces(text, 10), frames=10**6)
    assert sum(parsed) < 20 * len(text)


def feed_and_fail(terminal, parts, error=ZeroDivisionError):
    with closing(Eager(terminal.console)) as stream:
        for part in parts:
            stream.feed(part)
        raise error


@pytest.mark.parametrize("seed", range(10))
def test_after_an_exception_the_text_so_far_is_there_once(seed):
    parts = pieces(markdown(seed), 17)
    parts = parts[: random.Random(seed).randint(0, len(parts))]
    terminal = Terminal(30, 6)
    with pytest.raises(ZeroDivisionError):
        feed_and_fail(terminal, parts)
    assert_same(terminal, printed("".join(parts), 30, 6))


@pytest.fixture
def ctrl_c():
    """Presses it, with Python's own handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [*range(0, 30, 5), 10**6])
@pytest.mark.parametrize("where", ["blocks", "write"])
def test_ctrl_c_in_a_frame_waits_for_its_end(monkeypatch, ctrl_c, where, at):
    """Also in the last frame, by `close`."""
    terminal, text = Terminal(30, 6), "".join(markdown(seed) + "\n\n" for seed in range(3))
    owner = markdown_stream if where == "blocks" else terminal
    do, calls, fed = getattr(owner, where), itertools.count(), []

    def interrupted(drawn):
        if next(calls) == at or sum(map(len, fed)) == len(text):
            ctrl_c()
        return do(drawn)

    def feed():
        for part in pieces(text, 12):
            fed.append(part)
            yield part

    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        feed_and_fail(terminal, feed())
    monkeypatch.undo()
    assert_same(terminal, printed("".join(fed), 30, 6))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_file_gets_the_text_without_any_escapes():
    file, text = io.StringIO(), markdown(5)
    with closing(MarkdownStream(Console(file=file, width=50, _environ={}))) as stream:
        for part in pieces(text, 9):
            stream.feed(part)
    reference = io.StringIO()
    Console(file=reference, width=50, _environ={}).print(render(text))
    assert file.getvalue() == reference.getvalue()
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_console_of_few_characters_shows_the_others_as_question_marks(encoding):
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding), width=40, _environ={})
    with closing(MarkdownStream(console)) as stream:
        stream.feed("- é 日本\n\n> q\n\n```\nx\n```\n\n| a |\n|---|\n| b |\n\n---\n")
    shown = raw.getvalue().decode(encoding)
    assert ("日本" in shown) == (encoding == "utf-8")
    assert ("é" in shown) == (encoding != "ascii")
    assert ("│" in shown) == (encoding == "utf-8")


def test_only_its_own_escapes_reach_the_terminal():
    for seed in range(30):
        terminal = streamed(Terminal(colours="truecolor"), pieces(markdown(seed), 3))
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", "".join(terminal.frames))
        assert sanitize(plain) == plain
        assert "\t" not in plain


def test_no_letter_or_digit_is_lost():
    for seed in range(0, TEXTS, 2):
        text = sanitize(markdown(seed)).replace("[same](same)", "same")
        file = io.StringIO()
        Console(file=file, width=800, _environ={}).print(render(text))
        alphanumeric = [Counter(filter(str.isalnum, each)) for each in (text, file.getvalue())]
        assert not alphanumeric[0] - alphanumeric[1], (seed, text)


BRACKETS = r"""
[/INST] [INST] [bold] [/bold] [/] [ ] [[ ]] [1] [x]: [link=u] [red]x[/red] \[ :x: a
"""


def test_brackets_are_shown_as_they_are():
    made, parts = random.Random(0), [*BRACKETS.split(), " "]
    lines = [f"a{''.join(made.choices(parts, k=made.randint(1, 8)))}b" for _ in range(10 * TEXTS)]
    for batch in (lines[start : start + 100] for start in range(0, len(lines), 100)):
        terminal = streamed(Terminal(100, 20), ["\n".join(batch)], frames=0)
        assert terminal.rows == batch


@pytest.mark.parametrize(
    "text",
    [
        "<think>",
        "vector<T>",
        "a <b>x</b> c",
        "&amp; &lt; &#65;",
        r"\(a*b*c\) and \[x_1\]",
        r"\( alone and \{x\}",
        "2*3*4 is a*b*c",
        "[x]: http://u",
        "[text][x]",
        "<http://u.v>",
        "<div>\na\n</div>",
        "one\ntwo",
        "Title\n===",
        ":smile: __",
        "snake_case_name",
    ],
)
def test_text_that_is_not_markdown_stays_as_typed(text):
    assert rows_of(text) == text.split("\n")


def test_what_blocks_look_like():
    text = (
        "# Title\nText **b** `c`\n[a](http://u 'T') ![i](p) [u](u)\n\n\n- x\n- y\n\n  z\n  1. one\n"
        "  10. ten\n\n> q\n> > r\n\n```py\n\ta = 1\n```\n***\n| a | b |\n|--:|---|\n| 1 | 日本 |\n"
        "| long |\n"
    )
    assert rows_of(text, 24) == [
        "Title",
        "Text b c",
        'a (http://u "T") i (p) u',
        "",
        "• x",
        "• y",
        "",
        "  z",
        "  1. one",
        "  10. ten",
        "",
        "│ q",
        "│ │ r",
        "",
        "── py ──────────────",
        "    a = 1",
        "────────────────────",
        "────────────────────────",
        "┌──────┬──────┐",
        "│    a │ b    │",
        "├──────┼──────┤",
        "│    1 │ 日本 │",
        "│ long │      │",
        "└──────┴──────┘",
    ]


def test_a_table_that_does_not_fit_or_has_too_many_cells_is_shown_as_typed():
    table = "| a | b | c |\n|---|---|---|\n| 1 | 2 | 3 |"
    assert "".join(rows_of(table, 12)).replace(" ", "") == table.replace("\n", "").replace(" ", "")
    table = "| a |\n|---|\n| x || y |"
    assert rows_of(table) == table.split("\n")


def test_code_is_coloured_on_the_terminals_own_background():
    cells = printed('```python\ndef f(): return "x"  # y\n```', 60, 12, "truecolor").cells
    assert len({cell.fg for cell in cells[1]}) > 3
    assert {cell.bg for row in cells for cell in row} == {"default"}


@pytest.mark.parametrize("language", ["python", "c", "html", "php", "json", "nonsense", ""])
def test_code_keeps_its_characters_in_every_language(language):
    code = "\n".join(CODE * 10).replace("\t", "    ")
    shown = rows_of(f"```{language}\n{code}\n```", 100)[1:-1]
    assert shown == [line.rstrip() for line in code.split("\n")]


@pytest.mark.parametrize("width", [1, 2, 3, 5, 10])
def test_the_narrowest_terminals_show_it_all(width):
    text = "\n\n".join(
        ["- " * 8 + "deep", "> " * 30 + "deep", "1. one", "日本", "| a |\n|---|\n| b |"]
    )
    shown = "".join(rows_of(text, width)).replace(" ", "")
    assert shown.count("deep") == 2
    assert "one" in shown
