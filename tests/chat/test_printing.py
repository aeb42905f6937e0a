"""Text for a person: nothing acts on the terminal, and words stay whole."""

import ast
import io
import os
import pty
from pathlib import Path

import pytest
from screens import Tty

import mixchat
from mixchat.chat.printing import fitted, one_line, say, show, show_path, wrapped

PACKAGE = Path(mixchat.__file__).parent
HOSTILE = "evil\x1b]0;pwned\x07\x9b2J\u202egnp.txt\nerror: forged"


def printing_calls(path):
    """The calls in a file that print past the one place."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            asks_typer = name.startswith("typer.") and name.split(".")[1] in TYPERS
            if name in ("print", "input", *STREAMS) or asks_typer:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}"


TYPERS = ("echo", "secho", "echo_via_pager", "confirm", "prompt")
STREAMS = (
    "sys.stdout.write",
    "sys.stderr.write",
    "sys.stdout.buffer.write",
    "traceback.print_exception",
)


def test_nothing_is_printed_past_the_one_place():
    """Names of files reached the terminal raw from six commands: each printed by itself."""
    allowed = {"chat/printing.py": "print", "cli/models.py": "typer.confirm"}
    found = [
        call
        for room in ("cli", "chat")
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for call in printing_calls(path)
        if allowed.get(str(path.relative_to(PACKAGE))) != call.split(": ")[1]
        and not call.startswith("chat/printing.py")
    ]
    assert found == []


@pytest.mark.parametrize("out", [Tty(), io.StringIO()])
def test_a_message_is_one_line_without_control_characters(out):
    say(f"removed: {HOSTILE}", stream=out)
    assert out.getvalue() == "removed: evil]0;pwned2Jgnp.txt error: forged\n"


def test_what_was_asked_for_is_made_harmless_for_a_terminal_alone():
    terminal, pipe = Tty(), io.StringIO()
    for out in (terminal, pipe):
        show(HOSTILE, out)
    assert terminal.getvalue() == "evil]0;pwned2Jgnp.txt\nerror: forged\n"
    assert pipe.getvalue() == f"{HOSTILE}\n"


def test_a_path_reaches_a_program_byte_for_byte(tmp_path, monkeypatch):
    """Bytes that are no UTF-8 became question marks, and a script found no such file."""
    path = Path(os.fsdecode(b"/\xff\x1b[1m"))
    with open(tmp_path / "out", "w+", errors="replace") as file:
        monkeypatch.setattr("sys.stdout", file)
        show_path(path)
    assert (tmp_path / "out").read_bytes() == b"/\xff\x1b[1m\n"
    terminal = Tty()
    monkeypatch.setattr("sys.stdout", terminal)
    show_path(path)
    assert terminal.getvalue() == "/[1m\n"


@pytest.mark.parametrize(
    ("line", "rows"),
    [
        ("fits into the row", ["fits into the row"]),
        ("note: one two three four five", ["note: one two three", "      four five"]),
        ("(one two three four five six)", ["(one two three four", " five six)"]),
        ("key  one two three four five", ["key  one two three", "     four five"]),
        ("one two three four five six", ["one two three four", "five six"]),
        (f"see {'x' * 30} for more", [f"see {'x' * 30}", "for more"]),
        ("日本 日本 日本 日本 日本", ["日本 日本 日本 日本", "日本"]),
        ("error: a/path/of/18/chars x", ["error:", "  a/path/of/18/chars", "  x"]),
    ],
)
def test_a_line_breaks_between_words_after_its_label(line, rows):
    assert wrapped(line, 20).split("\n") == rows


def test_a_program_gets_a_message_in_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = "word " * 30
    assert fitted(text, io.StringIO()) == text
    assert "\n" in fitted(text, Tty())


def test_the_width_comes_from_the_streams_own_terminal(monkeypatch):
    """With standard output in a pipe, messages on the terminal were laid out for 80 columns."""
    import fcntl
    import struct
    import termios

    monkeypatch.delenv("COLUMNS", raising=False)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with open(slave, "w") as terminal:
        assert max(map(len, fitted("word " * 30, terminal).split("\n"))) <= 40
    os.close(master)


def test_a_name_stays_in_its_line():
    assert one_line("a\nb\x85c\u2028d\x1b") == "a b c d"
