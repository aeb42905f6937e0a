"""A screen shows text raw or drawn, with signs of life, and never a control character."""

import io

import pyte
import pytest
from screens import Tty

from mixchat.chat.terminal.screen import Screen
from mixchat.face.events import End, LeftOut, Piece, Reading
from mixchat.text.messages import Message


class ShownTty(Tty):
    """It is shown by a terminal of 40 columns."""

    @property
    def shown(self) -> list[str]:
        screen = pyte.Screen(40, 24)
        pyte.Stream(screen).feed(self.getvalue().replace("\n", "\r\n"))
        lines = [line.rstrip() for line in screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "24")


END = End("stop")


def answered(*pieces):
    yield from (Piece(piece) if isinstance(piece, str) else piece for piece in pieces)
    yield END


def thought(*pieces):
    return [
        Piece(thinking=piece, thinking_tokens=10 * count) for count, piece in enumerate(pieces, 1)
    ]


def test_the_rest_of_an_answer_is_drawn_as_what_it_continues_with():
    """/continue drew code as prose: its comments became headings."""
    out = ShownTty()
    assert Screen(out).show(answered("# Example\n", "x\n```\n"), "```\na\n") is END
    assert out.shown[1:] == ["a", "# Example", "x", "─" * 20]


@pytest.mark.parametrize(
    ("raw", "out", "term"),
    [(True, ShownTty(), "xterm"), (False, io.StringIO(), "xterm"), (False, ShownTty(), "dumb")],
)
def test_raw_or_elsewhere_it_is_shown_as_it_is_written(raw, out, term, monkeypatch):
    monkeypatch.setenv("TERM", term)
    Screen(out, raw=raw).show(answered("# Ti", "tle\n\n**b**"))
    assert out.getvalue() == "# Title\n\n**b**\n"


@pytest.mark.parametrize("raw", [True, False])
def test_what_breaks_an_answer_off_leaves_all_that_came_on_the_screen(raw):
    def broken():
        yield Piece("Hello, ")
        yield Piece("wor")
        raise RuntimeError

    out = ShownTty()
    with pytest.raises(RuntimeError):
        Screen(out, raw=raw).show(broken())
    assert out.shown == ["Hello, wor"]
    assert out.getvalue().endswith(("\n", "\x1b[?2026l"))


def test_a_prompt_that_takes_long_shows_how_much_of_it_is_read_until_the_answer_comes():
    out, clock = ShownTty(), Clock()

    def events():
        yield Reading(10, 2000)
        assert out.shown == []
        for clock.now, done in ((1.0, 500), (1.01, 510), (1.2, 1234)):
            yield Reading(done, 2000)
        assert out.shown == ["reading 1,234 of 2,000 tokens (62%)"]
        assert "510" not in out.getvalue()  # too soon after the one before
        yield from answered(LeftOut(1, 2), "Hello")

    Screen(out, clock=clock).show(events())
    assert " ".join(out.shown[:-1]).startswith("(the context is full: the oldest turn is")
    assert out.shown[-1] == "Hello"


@pytest.mark.parametrize("expected", [40.0, 2.0, None])
def test_the_time_of_a_long_prompt_is_said_before_it_is_read_and_meanwhile(expected):
    out, clock = ShownTty(), Clock()

    def events():
        for _ in range(2):  # it stays long enough to be read
            yield Reading(0, 3200)
            assert out.shown == ["reading 3,200 tokens, about 40 s"] * (expected == 40)
            clock.now += 0.45
        clock.now = 10.0
        yield Reading(800, 3200)
        assert out.shown[0].startswith("reading 800 of 3,200 tokens (25%), abou")
        clock.now = 39.0
        yield Reading(3150, 3200)
        assert out.getvalue().endswith("(98%)")
        yield END

    Screen(out, clock=clock).show(events(), expected=lambda tokens: expected)


def test_a_server_is_waited_for_until_it_tells_how_far_it_is():
    out, clock = ShownTty(), Clock()

    def events():
        yield Reading(0, 0)
        assert out.shown == ["waiting for the server"]
        clock.now = 2.0
        yield Reading(500, 2000)
        assert out.shown == ["reading 500 of 2,000 tokens (25%), abou"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Screen(out, clock=clock, raw=True).show(events())
    assert out.shown == []


def test_below_an_answer_is_a_line_while_it_is_written():
    out, clock, lines = ShownTty(), Clock(), iter(["1 tok/s", "2 tok/s", "3 tok/s"])

    def pieces():
        for clock.now, piece in ((0.0, "One "), (0.2, "two "), (0.6, "three")):
            yield Piece(piece)
            shown.append(out.shown[-1:])
        yield END

    shown = []
    Screen(out, clock=clock).show(pieces(), "", lambda: next(lines))
    assert shown == [["1 tok/s"], ["1 tok/s"], ["2 tok/s"]]
    assert "tok/s" not in "".join(out.shown)


def test_elsewhere_there_are_neither_signs_of_life_nor_thinking():
    out, clock = io.StringIO(), Clock()
    clock.now = 5.0
    Screen(out, clock=clock).show(answered(Reading(5, 10), *thought("Hm"), "Yes"))
    assert out.getvalue() == "Yes\n"


def test_earlier_turns_are_shown_with_what_was_asked():
    out = io.StringIO()
    lines = "\n".join(f"line {number}" for number in range(250))
    answer = Message("assistant", "**So**", partial=True, thinking="Hm", thinking_tokens=1)
    Screen(out).show_turns([Message("user", lines), answer])
    assert out.getvalue() == (
        ">>> line 0\n... line 1\n... line 2\n... line 3\n... line 4\n... (241 more lines)\n"
        "... line 246\n... line 247\n... line 248\n... line 249\n"
        "(thought for 1 token)\n**So**\n(unfinished; /continue resumes it)\n\n"
    )


def test_a_resumed_question_has_the_colours_that_it_was_typed_in(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = ShownTty()
    Screen(out, raw=True).show_turns([Message("user", "a\x1b[31m\n\nb")])
    mark, words = "\x1b[1;32m{}\x1b[0m", "\x1b[32m{}\x1b[0m"
    assert out.getvalue().split("\n") == [
        f"{mark.format('>>>')} {words.format('a[31m')}",
        f"{mark.format('...')} ",
        f"{mark.format('...')} {words.format('b')}",
        "",
    ]


@pytest.fixture
def paced(monkeypatch):
    """Each piece is drawn at once."""
    monkeypatch.setattr("mixchat.chat.draw.markdown_stream._MIN_FRAME_INTERVAL_S", 0)
    monkeypatch.setattr("mixchat.chat.draw.markdown_stream._MAX_DRAWING_SHARE", 1)


def test_thinking_is_faint_until_the_answer_begins_then_a_line_with_its_length(paced):
    out, shown = ShownTty(), []

    def events():
        for event in thought("Hm, **so**", *(f"\n{number}" for number in range(30))):
            yield event
            shown.append(out.shown)
        yield Piece("**Yes**")
        yield END

    Screen(out).show(events(), below=lambda: "status")
    assert shown[0] == ["Hm, **so**", "status"]
    assert shown[-1] == [*(str(number) for number in range(8, 30)), "status"]  # what fits
    assert "\x1b[2mHm, **so**\x1b[0m" in out.getvalue()
    assert out.shown == ["(thought for 310 tokens)", "", "Yes"]


def test_thinking_that_is_hidden_shows_a_sign_of_life_and_leaves_nothing():
    out, clock = ShownTty(), Clock()

    def events():
        for clock.now, event in zip((2.0, 2.01, 3.0), thought("a", "b", "c"), strict=True):
            yield event
        assert out.shown == ["thinking, 30 tokens"]
        yield from answered("Yes")

    Screen(out, clock=clock).show(events(), shows_thinking=False)
    assert out.shown == ["Yes"]
    assert "20 tokens" not in out.getvalue()


def test_raw_thinking_is_faint_above_its_length():
    out = ShownTty()
    Screen(out, raw=True).show(answered(*thought("Hm\x1b", " so"), "**Yes**"))
    assert out.shown == ["Hm so", "(thought for 20 tokens)", "", "**Yes**"]
    assert "\x1b[2m so\x1b[0m" in out.getvalue()
