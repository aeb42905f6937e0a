"""A screen shows text raw or drawn, with signs of life, and never a control character."""

import io
import time

import pyte
import pytest

from mixchat.chat.terminal.screen import Screen
from mixchat.face.events import End, LeftOut, Piece, Reading
from mixchat.text.messages import Message


class Tty(io.StringIO):
    """Says that it is a terminal, and is shown by one of 40 columns."""

    def isatty(self) -> bool:
        return True

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


def test_in_a_terminal_an_answer_is_drawn_as_markdown():
    out = Tty()
    end = Screen(out).show(answered("# Ti", "tle\n\n- a\n- **b**"))
    assert end is END
    text = "\n".join(out.shown)
    assert "Title" in text
    assert "#" not in text
    assert "**" not in text


def test_the_rest_of_an_answer_is_drawn_as_what_it_continues_with():
    """/continue drew code as prose: its comments became headings."""
    out = Tty()
    Screen(out).show(answered("# Example\n", "x\n```\n"), "```\na\n")
    assert out.shown[1:] == ["a", "# Example", "x", "─" * 20]


@pytest.mark.parametrize(("raw", "out"), [(True, Tty()), (False, io.StringIO())])
def test_raw_or_elsewhere_it_is_shown_as_it_is_written(raw, out):
    Screen(out, raw=raw).show(answered("# Ti", "tle\n\n**b**"))
    assert out.getvalue() == "# Title\n\n**b**\n"


def test_a_dumb_terminal_gets_what_is_written(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Tty()
    Screen(out).show(answered("**b**"))
    assert out.getvalue() == "**b**\n"


@pytest.mark.parametrize("raw", [True, False])
def test_no_control_character_of_an_answer_gets_through(raw):
    out, hostile = Tty(), "a\x1b[2Jb\x9b31mc\x1b]0;title\x07d\u202ee\x08f\rg"
    Screen(out, raw=raw).show(answered(*hostile))
    assert "".join(out.shown).startswith("a[2Jb31mc]0;titledefg")
    assert "\x1b[2J" not in out.getvalue()
    assert not set("\x9b\x07\u202e\x08") & set(out.getvalue())


def test_what_is_left_out_is_said():
    out = io.StringIO()
    Screen(out).show(answered(LeftOut(1, 2), "Hello"))
    Screen(out).show(answered(LeftOut(3, 6), "Hello"))
    assert "the oldest turn is left out" in out.getvalue()
    assert "the 3 oldest turns are left out" in out.getvalue()


@pytest.mark.parametrize("raw", [True, False])
def test_what_breaks_an_answer_off_leaves_all_that_came_on_the_screen(raw):
    def broken():
        yield Piece("Hello, ")
        yield Piece("wor")
        raise RuntimeError

    out = Tty()
    with pytest.raises(RuntimeError):
        Screen(out, raw=raw).show(broken())
    assert out.shown == ["Hello, wor"]
    assert out.getvalue().endswith(("\n", "\x1b[?2026l"))


def test_a_prompt_that_takes_long_shows_how_much_of_it_is_read_until_the_answer_comes():
    out, clock = Tty(), Clock()

    def events():
        yield Reading(10, 2000)
        assert out.shown == []
        for clock.now, done in ((1.0, 500), (1.01, 510), (1.2, 1234)):
            yield Reading(done, 2000)
        assert out.shown == ["reading 1,234 of 2,000 tokens (62%)"]
        assert "510" not in out.getvalue()  # too soon after the one before
        yield from answered("Hello")

    Screen(out, clock=clock).show(events())
    assert out.shown == ["Hello"]


def test_the_time_of_a_long_prompt_is_said_before_it_is_read_and_what_is_left_meanwhile(
    monkeypatch,
):
    monkeypatch.setenv("COLUMNS", "60")
    out, clock = Tty(), Clock()

    def events():
        yield Reading(0, 3200)
        assert out.shown == ["reading 3,200 tokens, about 40 s"]
        clock.now = 0.9
        yield Reading(32, 3200)
        assert out.shown == ["reading 3,200 tokens, about 40 s"]
        clock.now = 10.0
        yield Reading(800, 3200)
        assert "reading 800 of 3,200 tokens (25%), about 30 s left" in out.getvalue()
        clock.now = 39.0
        yield Reading(3150, 3200)
        assert out.getvalue().endswith("(98%)")
        yield END

    Screen(out, clock=clock).show(events(), expected=lambda tokens: tokens / 80)


@pytest.mark.parametrize("expected", [None, 2.0])
def test_of_a_prompt_that_takes_no_time_or_an_unknown_one_nothing_is_said_before(expected):
    out = Tty()
    reading = answered(Reading(0, 3200))
    Screen(out, clock=Clock()).show(reading, expected=lambda tokens: expected)
    assert out.shown == []


def test_a_server_is_waited_for_until_it_tells_how_far_it_is():
    out, clock = Tty(), Clock()

    def events():
        yield Reading(0, 0)
        assert out.shown == ["waiting for the server"]
        clock.now = 2.0
        yield Reading(500, 2000)
        assert out.shown == ["reading 500 of 2,000 tokens (25%), abou"]
        yield from answered(LeftOut(2, 4), "Hi")

    Screen(out, clock=clock, raw=True).show(events())
    assert out.shown == [
        "(the context is full: the 2 oldest turns",
        " are left out from here on)",
        "Hi",
    ]


def test_below_an_answer_is_a_line_while_it_is_written():
    out, clock, lines = Tty(), Clock(), iter(["1 tok/s", "2 tok/s", "3 tok/s"])

    def pieces():
        for clock.now, piece in ((0.0, "One "), (0.2, "two "), (0.6, "three")):
            yield Piece(piece)
            shown.append(out.shown[1:])
            time.sleep(0.04)  # after a frame the drawing pauses
        yield END

    shown = []
    assert Screen(out, clock=clock).show(pieces(), "", lambda: next(lines)) is END
    assert [rows[-1:] for rows in shown] == [["1 tok/s"], ["1 tok/s"], ["2 tok/s"]]
    assert "tok/s" not in "".join(out.shown)


def test_the_line_is_gone_if_no_answer_comes():
    out, clock = Tty(), Clock()

    def events():
        clock.now = 2.0
        yield Reading(5, 10)
        assert out.shown != []
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Screen(out, clock=clock).show(events())
    assert out.shown == []


def test_elsewhere_there_are_no_signs_of_life():
    out, clock = io.StringIO(), Clock()
    clock.now = 5.0
    Screen(out, clock=clock).show(answered(Reading(5, 10)))
    assert out.getvalue() == ""


def test_of_a_long_question_the_beginning_and_the_end_are_shown():
    out = io.StringIO()
    lines = [f"line {number}" for number in range(250)]
    Screen(out).show_turns([Message("user", "\n".join(lines))])
    shown = out.getvalue().splitlines()
    assert shown[0] == ">>> line 0"
    assert shown[5] == "... (241 more lines)"
    assert shown[-1] == "... line 249"
    assert len(shown) == 10


def test_earlier_turns_are_shown_with_what_was_asked():
    out = io.StringIO()
    question, answer = Message("user", "Why\nnot?"), Message("assistant", "**So**", partial=True)
    Screen(out).show_turns([question, answer])
    assert out.getvalue() == ">>> Why\n... not?\n**So**\n(unfinished; /continue resumes it)\n\n"


def test_a_resumed_question_has_the_colours_that_it_was_typed_in(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = Tty()
    Screen(out, raw=True).show_turns([Message("user", "a\x1b[31m\n\nb")])
    mark, words = "\x1b[1;32m{}\x1b[0m", "\x1b[32m{}\x1b[0m"
    assert out.getvalue().split("\n") == [
        f"{mark.format('>>>')} {words.format('a[31m')}",
        f"{mark.format('...')} ",
        f"{mark.format('...')} {words.format('b')}",
        "",
    ]


def thought(*pieces):
    return [
        Piece(thinking=piece, thinking_tokens=10 * count) for count, piece in enumerate(pieces, 1)
    ]


@pytest.fixture
def paced(monkeypatch):
    """Each piece is drawn at once."""
    monkeypatch.setattr("mixchat.chat.draw.markdown_stream._MIN_FRAME_INTERVAL_S", 0)
    monkeypatch.setattr("mixchat.chat.draw.markdown_stream._MAX_DRAWING_SHARE", 1)


def test_thinking_is_faint_until_the_answer_begins_then_a_line_with_its_length(paced):
    out, shown = Tty(), []

    def events():
        for event in thought("Hm, **so**", "\n- one\n"):
            yield event
            shown.append(out.shown)
        yield Piece("**Yes**")
        yield END

    Screen(out).show(events(), below=lambda: "status")
    assert shown[0] == ["Hm, **so**", "status"]
    assert shown[1] == ["Hm, **so**", "- one", "status"]
    assert "\x1b[2mHm, **so**\x1b[0m" in out.getvalue()
    assert out.shown == ["(thought for 20 tokens)", "", "Yes"]


def test_of_thinking_longer_than_the_screen_the_end_is_shown_and_one_line_left(paced):
    out, shown = Tty(), []

    def events():
        for number in range(100):
            yield from thought(f"thought {number}\n")
            shown.append(out.shown)
        yield Piece("Yes")
        yield END

    Screen(out).show(events())
    assert shown[-1][-1] == "thought 99"
    assert len(shown[-1]) == 23
    assert out.shown == ["(thought for 10 tokens)", "", "Yes"]


def test_thinking_that_is_cut_off_leaves_its_length(paced):
    out = Tty()
    Screen(out).show(answered(*thought("Hm", "mm")))
    assert out.shown == ["(thought for 20 tokens)"]


def test_thinking_that_is_hidden_shows_a_sign_of_life_and_leaves_nothing():
    out, clock = Tty(), Clock()
    screen = Screen(out, clock=clock)

    def events():
        for clock.now, event in zip((2.0, 2.01, 3.0), thought("a", "b", "c"), strict=True):
            yield event
        assert out.shown == ["thinking, 30 tokens"]
        yield Piece("Yes")
        yield END

    screen.show(events(), shows_thinking=False)
    assert out.shown == ["Yes"]
    assert "20 tokens" not in out.getvalue()


def test_raw_thinking_is_faint_above_its_length():
    out = Tty()
    Screen(out, raw=True).show(answered(*thought("Hm\x1b", " so"), "**Yes**"))
    assert out.shown == ["Hm so", "(thought for 20 tokens)", "", "**Yes**"]
    assert "\x1b[2m so\x1b[0m" in out.getvalue()


def test_no_thinking_goes_anywhere_but_to_a_terminal():
    out = io.StringIO()
    Screen(out).show(answered(*thought("Hm"), "Yes"))
    assert out.getvalue() == "Yes\n"


def test_a_resumed_chat_shows_the_length_of_thinking():
    out = io.StringIO()
    Screen(out).show_turns([Message("assistant", "Yes", thinking="Hm", thinking_tokens=1)])
    assert out.getvalue() == "(thought for 1 token)\nYes\n\n"
