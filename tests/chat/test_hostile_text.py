"""No control sequence of a model's answer reaches the terminal."""

import io
import random
import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from screens import Tty

from mixchat.chat.draw import markdown_stream
from mixchat.chat.draw.markdown import MarkdownText
from mixchat.chat.terminal.screen import Screen
from mixchat.face.events import End, Piece

ESC, BEL, ST = "\x1b", "\x07", "\x1b\\"
FORBIDDEN = {chr(c) for c in [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F)]}
FORBIDDEN |= {chr(c) for c in range(0x2066, 0x206A)}
FORBIDDEN -= {"\n", "\t", "\r"}
# Rich uses only 16 colours here, so other colours are those of the answers.
STYLES = re.compile(r"\x1b\[(?!38;5)[0-9;]*m")
# The sequences that drawing itself sends.
NAMES = ("_BEGIN", "_END", "_NO_WRAP", "_WRAP", "_HIDE_CURSOR", "_SHOW_CURSOR", "_ERASE_BELOW")
OWN = [getattr(markdown_stream, name) for name in NAMES]


def control_sequence(chance: random.Random) -> str:
    """Return a sequence that a terminal would act on, with text around it."""
    number = chance.randrange(200)
    csi = chance.choice(["\x1b[", "\x9b"])
    text = chance.choice(
        [
            f"{csi}{number}{chance.choice('ABCDEFGHJKPSTXdfmnrsu')}",
            f"{csi}?{number}{chance.choice('hl')}",
            f"{csi}38;5;{number}m",
            f"{chance.choice([ESC + ']', chr(0x9D)])}{number % 60};x{chance.choice([BEL, ST])}",
            f"{chance.choice([ESC + 'P', chr(0x90)])}q{number}\x1b\\",
            f"\x1b{chance.choice('78=>cDEHMNOZ')}",
            f"\x1b({chance.choice('0AB')}",
            chance.choice("\x00\x05\x07\x08\x0b\x0c\x0e\x0f\x7f\x84\x85\x8d\x98"),
            chance.choice("\u202a\u202b\u202d\u202e\u2066\u2067\u2068") + "abc",
        ]
    )
    return chance.choice(["", "**", "`", "# "]) + text + chance.choice(["", "b", "`", "**", " c"])


def answer(*pieces: str) -> Iterator[Any]:
    yield from map(Piece, pieces)
    yield End("stop")


def shown(*pieces: str, raw: bool) -> str:
    """Return what the terminal gets of an answer, without what drawing sends itself."""
    out = Tty()
    Screen(out, raw=raw).show(answer(*pieces))
    text = out.getvalue()
    for sequence in OWN:
        text = text.replace(sequence, "")
    return STYLES.sub("", text)


def leaks(count: int) -> list[str]:
    """Return the sequences that reach the terminal, each cut everywhere, raw and drawn."""
    chance = random.Random(1)
    return [
        payload
        for payload in (control_sequence(chance) for _ in range(count))
        for at in range(1, len(payload))
        for raw in (True, False)
        if set(shown("a ", payload[:at], payload[at:], raw=raw)) & FORBIDDEN
    ]


def test_no_control_sequence_reaches_the_terminal_wherever_it_is_cut(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLORTERM", "")
    assert leaks(60) == []
    monkeypatch.setattr("mixchat.chat.terminal.screen.sanitize", str)
    assert leaks(60) != []  # it would see them


def test_no_entity_of_a_link_becomes_a_character_that_a_terminal_acts_on(monkeypatch):
    """`[a](&#x202e;gpj.exe)` turned the text after it around, and `&#13;` wrote over the row."""
    monkeypatch.setenv("TERM", "xterm")
    drawn = shown("[a](&#x202e;gpj.exe 't&#13;&rlm;&#x9b;') ![b](c&lrm;d) | &amp;\n", raw=False)
    assert not set(drawn) & (FORBIDDEN | set("\u200e\u200f"))
    assert '(&#8238;gpj.exe "t&#13;&#8207;&#x9b;")' in drawn
    assert "(c&#8206;d)" in drawn
    drawn = shown("| a |\n|--|\n| [x](y&#x202e;?a=1&amp;b) |\n", raw=False)
    assert "y&#8238;?a=1&b" in drawn


def test_an_entity_of_a_link_can_be_written_in_any_encoding():
    """An answer ended with a UnicodeEncodeError in a terminal without UTF-8."""
    data = io.BytesIO()
    out = io.TextIOWrapper(data, encoding="ascii")
    Console(file=out, force_terminal=True).print(MarkdownText("[a](b&#x1f600;c)"))
    out.flush()
    assert b"b&#128512;c" in data.getvalue()
