"""The prompt as the screen shows it, and what was typed before it."""

import time

import pytest
from prompt_toolkit.application import create_app_session, run_in_terminal
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from prompt_tools import COMMANDS, CTRL_C, CTRL_D, CTRL_J, ENTER, ESC, TAB, bar, look

from mixchat.chat.terminal.completion import CommandCompleter, CommandCompletion
from mixchat.chat.terminal.prompt import ChatPrompt


def test_the_bottom_line_is_one_line_of_any_window():
    with look(width=20, status=lambda: "模型 · 1,234 of\n8,192 tokens\x1b[2J") as screen:
        screen.wait_for("模")
        assert screen.lines[-1].startswith("模型 · 1,234 of 8,1…")
        assert len(screen.lines) == 2


def test_the_bottom_line_tells_the_mode_of_vi():
    with look(vi=True) as screen:
        screen.wait_for("[insert] demo")
        screen.type(ESC)
        screen.wait_for("[normal] demo")


def test_new_lines_have_a_prompt_and_wrapped_ones_have_none():
    with look(width=20) as screen:
        screen.type("a" * 20 + CTRL_J + "b")
        screen.wait_for("... b")
        assert screen.lines[:3] == [">>> " + "a" * 16, "    aaaa", "... b"]


def test_a_slash_opens_the_menu_and_tab_takes_from_it():
    with look() as screen:
        screen.type("/")
        screen.wait_for("change a setting")
        screen.type("s")
        screen.wait_for("show this", there=False)
        screen.type(TAB)
        screen.wait_for(">>> /set")
        screen.type(TAB)
        screen.wait_for("top_p")
        screen.type(TAB)
        screen.wait_for(">>> /set temp")
        screen.type(ENTER)
        assert screen.read() == "/set temp"


def test_enter_goes_into_a_directory_of_the_menu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "monday.json").touch()
    with look() as screen:
        screen.type("/load c")
        screen.wait_for("      chats/")
        screen.type(TAB)
        screen.wait_for(">>> /load chats/")
        screen.type(ENTER)
        screen.wait_for("      monday.json")
        screen.type(TAB)
        screen.wait_for("/load chats/monday.json")
        screen.type(ENTER)
        assert screen.read() == "/load chats/monday.json"


# Without ^C, ^D, Enter, ^O (which sends, too), ^Z and ^\, which do what they always do.
CONTROL = bytes(set(range(32)) - {3, 4, 10, 13, 15, 26, 28}) + bytes(range(0x7F, 0xA0))


@pytest.mark.parametrize(
    "noise",
    [CONTROL, b"\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[?25l", b"\x1bP+q\x1b\\\x9b2J\xff\xfe"],
    ids=["controls", "title and colours", "no text"],
)
@pytest.mark.parametrize("vi", [False, True])
def test_raw_control_bytes_do_no_harm(noise, vi, monkeypatch):
    monkeypatch.setenv("EDITOR", "true")
    with look(vi=vi) as screen:
        screen.type(noise)
        time.sleep(0.1)
        screen.type(CTRL_C + CTRL_C)  # one may only end a search
        assert isinstance(screen.read(), KeyboardInterrupt)
        screen.ask()
        screen.type("fine" + ENTER)
        while isinstance(read := screen.read(), KeyboardInterrupt):
            screen.ask()
        assert read == "fine"


def test_enter_is_enter_while_a_note_is_printed_above():
    """A question that was sent in that moment got another line instead."""
    with look() as screen, screen.prompt.notes_above():
        app = screen.prompt._session.app
        app.loop.call_soon_threadsafe(run_in_terminal, lambda: screen.type("fine" + ENTER))
        assert screen.read() == "fine"


def test_what_turns_text_around_is_shown_in_a_line_from_the_history(tmp_path):
    """A question of before was shown in another order than it was asked in; it is sent as it is."""
    path = tmp_path / "history"
    path.write_text("\n# 2026\n+run \u202egpj.exe\x1b[31m\n", encoding="utf-8")
    with look(history=path) as screen:
        screen.type("run")
        screen.wait_for("run \ufffdgpj.exe^[[31m")  # as a suggestion
        screen.type("\x15\x1b[A")
        screen.wait_for(">>> run \ufffdgpj.exe^[[31m")
        screen.type(ENTER)
        assert screen.read() == "run \u202egpj.exe\x1b[31m"
        assert not any("\u202e" in line for line in screen.lines)


def test_what_turns_text_around_is_not_in_the_menu():
    names = CommandCompletion("", lambda typed: ["a\u202eb\x1b[31m"])
    completions = CommandCompleter({"load": names}).get_completions(Document("/load "), None)
    assert [completion.display_text for completion in completions] == ["ab[31m"]


@pytest.mark.parametrize(
    ("before", "lines"),
    [
        ("one é" + ENTER + "/two" + ENTER + ENTER + "thr", ["one é", "/two", ""]),
        ("thr", []),
        (ENTER + ENTER + "one" + ENTER + "thr", ["one"]),  # Enter alone is only impatience
        ("one" + ENTER + CTRL_D, ["one", EOFError]),
    ],
    ids=["lines", "half a line", "impatience", "Ctrl-D"],
)
def test_what_was_typed_before_the_prompt_is_read_line_by_line(before, lines):
    """Lines were put together into one that waited: commands among them became text."""
    with look(ask=False) as screen:
        screen.type(before)
        for line in lines:
            screen.ask()
            read = screen.read()
            assert (type(read) if isinstance(read, Exception) else read) == line
        if EOFError not in lines:
            screen.ask()
            screen.wait_for(">>> thr")
            screen.type("ee" + ENTER)
            assert screen.read() == "three"


@pytest.mark.parametrize("last", ["c", "c" + ENTER])
def test_a_marked_paste_from_before_the_prompt_is_one_text_that_waits(last):
    """Its last line has often no newline: the terminal gives it only to a prompt."""
    with look(ask=False) as screen:
        screen.type("zero" + ENTER + "\x1b[200~a" + ENTER + "/b" + ENTER + last + "\x1b[201~")
        screen.ask()
        assert screen.read() == "zero"
        screen.ask()
        screen.wait_for("... c")
        screen.type("!" + ENTER)
        assert screen.read() == "a\n/b\n" + last.replace(ENTER, "\n") + "!"


def test_a_long_paste_is_one_label_that_is_sent_and_saved_whole(tmp_path):
    """200 pasted lines filled the screen, and the words before them were out of sight."""
    lines = "\n".join(map(str, range(200)))
    with look(history=tmp_path / "history") as screen:
        screen.type(f"Why ab\x1b[200~{lines}\r\n\x1b[201~?")
        screen.wait_for(">>> Why ab[200 lines pasted]?")
        screen.type("\x1b[D\x1b[D\x1b[D\x7f")  # three to the left are before the b
        screen.wait_for(">>> Why b[200 lines pasted]?")
        screen.type("\x1b[200~" + "x" * 3000 + "\x1b[201~")
        screen.wait_for(">>> Why [3,000 characters pasted]b[200 lines pasted]?")
        screen.type("\x7f" + ENTER)
        assert screen.read() == f"Why b{lines}\n?"
        screen.ask()
        screen.type("again")
        screen.wait_for(">>> again")
        screen.type("\x15\x1b[A")  # in the same chat it is folded again
        screen.wait_for(">>> again", there=False)
        assert len(screen.lines) < 6
        screen.type(" And?" + ENTER)
        assert screen.read() == f"Why b{lines}\n? And?"
    with look(history=tmp_path / "history") as screen:
        screen.type("\x1b[A" + ENTER)
        assert screen.read() == f"Why b{lines}\n? And?"


def test_a_pasted_character_stands_for_no_other_paste():
    paste = "x\n" * 50
    with look() as screen:
        screen.type(f"\x1b[200~{paste}\x1b[201~a\x1b[200~\U00100000\x1b[201~" + ENTER)
        assert screen.read() == f"{paste}a"


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1"), ("TERM", "")])
def test_any_terminal_will_do(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with create_pipe_input() as source, create_app_session(source, DummyOutput()):
        source.send_text("/load \t!" + ENTER + "a" + CTRL_J + "b" + ENTER)
        prompt = ChatPrompt(None, COMMANDS, bar)
        assert [prompt.read(), prompt.read()] == ["/load !", "a\nb"]
