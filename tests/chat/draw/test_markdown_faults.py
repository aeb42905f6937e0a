"""The cost of drawing, and its rest after an exception, Ctrl-C, in a file or a narrow terminal."""

import io
import itertools
import os
import random
import signal
from collections import Counter
from contextlib import closing

import pytest
from markdown_texts import CODE, markdown
from markdown_tools import TEXTS, Clock, Eager, assert_same, pieces, printed, rows_of, streamed
from rich.console import Console
from screens import Terminal

from mixchat.base.sanitize import sanitize
from mixchat.chat.draw import markdown_stream
from mixchat.chat.draw.markdown import MarkdownText
from mixchat.chat.draw.markdown_stream import MarkdownStream


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
    Console(file=reference, width=50, _environ={}).print(MarkdownText(text))
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
    assert ("▌" in shown) == (encoding == "utf-8")


def test_no_letter_is_lost():
    """Digits are not counted: Rich numbers the items of a list within a list anew."""
    for seed in range(0, TEXTS, 2):
        text = sanitize(markdown(seed)).replace("[same](same)", "same")
        text = text.replace("&amp;", "&").replace("&lt;", "<")
        file = io.StringIO()
        Console(file=file, width=800, _environ={}).print(MarkdownText(text))
        letters = [Counter(filter(str.isalpha, each)) for each in (text, file.getvalue())]
        assert not letters[0] - letters[1], (seed, text)


@pytest.mark.parametrize(
    "text",
    [
        *("<think>", "[/INST] [bold]x[/bold] [ ] [[ ]] [link=u] [1]", "vector<T>"),
        *(
            "a <b>x</b> c",
            "&rarr; &#x202e; &#13; &#0; &such;",
            r"\(a*b*c\) and \[x_1\]",
            r"\( alone and \{x\}",
        ),
        *("2*3*4 is a*b*c", "[x]: http://u", "[text][x]", "<http://u.v>", "<div>\na\n</div>"),
        *("one\ntwo", "Title\n===", ":smile: __", "snake_case_name"),
    ],
)
def test_text_that_is_not_markdown_stays_as_typed(text):
    assert rows_of(text) == text.split("\n")


def test_an_entity_of_ascii_is_the_character_that_it_stands_for():
    """`&amp;` and `&lt;` stood on the screen as models write them for HTML."""
    text = "a &amp;&amp; b &lt; &#65; &quot;x&quot;&nbsp;y [u&amp;v](u&amp;v) `&lt;`"
    assert rows_of(text) == ['a && b < A "x" y u&v &lt;']


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
        " • x",
        " • y",
        "   z",
        "    1 one",
        "    2 ten",
        "",
        "▌ q",
        "▌ ▌ r",
        "",
        "── py ──────────────",
        "    a = 1",
        "────────────────────",
        "─" * 24,
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
