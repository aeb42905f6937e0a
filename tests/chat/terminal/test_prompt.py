"""The prompt, with keys from a pipe, and with a person's eyes: on an emulated screen."""

import os
import signal
import threading

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from prompt_tools import COMMANDS, CTRL_C, CTRL_D, CTRL_J, CTRL_R, EDIT, ENTER, ESC, bar, look

from mixchat.chat.terminal.prompt import ChatPrompt, quoted_text

ALT_ENTER, UP, DOWN, RIGHT = ESC + ENTER, ESC + "[A", ESC + "[B", ESC + "[C"
PASTE, PASTED = ESC + "[200~", ESC + "[201~"


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def typing(warnings):
    """Types keys and leaves: gives what was read, and what was raised."""
    rescue = []  # from a prompt that did not end at Ctrl-D

    def typed(keys, *, default="", **options):
        read = []
        with create_pipe_input() as source:
            source.send_text(keys + CTRL_D)
            rescue.append(threading.Timer(60, source.send_text, [CTRL_C + CTRL_C + CTRL_D]))
            rescue[-1].start()
            options = {"history": None, "warn": warnings.append} | options
            with create_app_session(source, DummyOutput()):
                prompt = ChatPrompt(commands=COMMANDS, status=bar, **options)
            while True:
                try:
                    read.append(prompt.read(default))
                except KeyboardInterrupt:
                    read.append(("Ctrl-C", prompt.typed))
                except EOFError:
                    return read
                default = ""

    yield typed
    for timer in rescue:
        timer.cancel()


def test_enter_sends_a_line_as_it_is(typing):
    assert typing("  Hi <b>& [x] \r\r" + "a" + CTRL_J * 2 + ENTER) == ["  Hi <b>& [x] ", "", "a"]


@pytest.mark.parametrize(("key", "vi"), [(CTRL_J, False), (CTRL_J, True), (ALT_ENTER, False)])
def test_a_key_adds_a_line(typing, key, vi):
    assert typing("a" + key + "b" + ENTER, vi=vi) == ["a\nb"]


@pytest.mark.parametrize("newline", ["\n", "\r", "\r\n"])
def test_pasted_lines_are_not_sent_before_enter(typing, newline):
    lines = newline.join(["a", "  b", "", "c", ""])
    assert typing(PASTE + lines + PASTED + "d" + ENTER) == ["a\n  b\n\nc\nd"]


def test_quotes_hold_several_lines(typing):
    assert typing('"""\ra\r  b\r\rc\r"""\rnext\r') == ["a\n  b\n\nc", "next"]
    assert typing(PASTE + '"""Doc."\nx' + PASTED + ENTER + 'y"""' + ENTER) == ['Doc."\nx\ny']


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        *(('"""a"""', "a"), ('""""""', ""), (' """a""" ', "a"), ('"""a\nb"""', "a\nb")),
        *(('"""\n  a\n"""', "  a"), ('"""\n\na\n\n"""', "\na\n")),
        *(('"""\n"""Doc."""\nx\n"""', '"""Doc."""\nx'), ('"""', None), ('"""""', None)),
        *(('"""a', None), ('"""\na', None), ('a"""', None), ('"""Doc."""\nx = 1', None)),
        *(('"""a""" or """b"""', None), ('"""a""" is a string', None)),
    ],
)
def test_what_stands_in_quotes(text, inner):
    assert quoted_text(text) == inner


def test_a_text_to_begin_with_can_be_changed(typing):
    assert typing("!" + ENTER, default="two\nlines") == ["two\nlines!"]


def test_ctrl_c_says_whether_there_was_text(typing):
    assert typing("a" + CTRL_C + CTRL_C + "b" + ENTER) == [("Ctrl-C", True), ("Ctrl-C", False), "b"]


@pytest.mark.parametrize(
    ("keys", "found"),
    [(UP + UP + UP + DOWN + "!" + ENTER, "b!"), (CTRL_R + "fi" + ENTER + ENTER, "find me")],
)
def test_what_was_sent_in_earlier_chats_is_found(typing, tmp_path, keys, found):
    typing("find me\rb\rc\r", history=tmp_path / "history")
    with look(history=tmp_path / "history") as screen:
        screen.type(keys)
        assert screen.read() == found


def test_a_key_takes_the_suggestion(typing, tmp_path):
    path = tmp_path / "history"
    typing("a long question\r", history=path)
    with look(history=path) as screen:
        screen.type("a lo")
        screen.wait_for("a long question")
        screen.type(RIGHT + ENTER)
        assert screen.read() == "a long question"


def test_a_history_that_fails_later_is_told_then(typing, tmp_path, warnings, monkeypatch):
    def fail(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mixchat.chat.terminal.input_history._append", fail)
    assert typing("one\rtwo\r", history=tmp_path / "history") == ["one", "two"]
    assert [str(tmp_path / "history") in warning for warning in warnings] == [True]


@pytest.fixture
def editor(tmp_path, monkeypatch):
    """Makes a shell script the editor; it has the file as $1."""

    def use(script):
        path = tmp_path / "an editor"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.delenv("VISUAL", raising=False)
        monkeypatch.setenv("EDITOR", f"'{path}' -x")

    return use


def test_the_editor_gets_the_text_and_gives_it_back_to_be_sent(typing, editor, tmp_path):
    seen = f'"{tmp_path}/seen"'
    editor(f'cp "$2" {seen}; stat -c "%a %n" "$2" >> {seen}; printf "two\\nlines\\n" > "$2"')
    assert typing("draft é" + EDIT + "!" + ENTER) == ["two\nlines!"]
    text, status = (tmp_path / "seen").read_text().splitlines()
    mode, path = status.split()
    assert (text, mode) == ("draft é", "600")  # nobody else reads it
    assert path.endswith(".md")
    assert not os.path.exists(path)


def test_v_in_vi_mode_opens_the_editor(typing, editor):
    editor('echo more >> "$2"')
    assert typing("draft" + ESC + "v" + ENTER, vi=True) == ["draft\nmore"]


@pytest.mark.parametrize(
    ("script", "told"),
    [("exit 1", "failed"), (r'printf "\377" > "$2"', "cannot read"), ('rm "$2"', "cannot read")],
)
def test_an_editor_that_fails_leaves_the_text_unsent(typing, editor, warnings, script, told):
    editor(script)
    assert typing("draft" + EDIT + "!" + ENTER) == ["draft!"]
    assert told in warnings[0]


@pytest.mark.parametrize("value", ["/no/such/editor", "'unclosed", "", " "])
def test_without_an_editor_the_text_stays(typing, warnings, monkeypatch, value):
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", value)
    monkeypatch.setenv("PATH", "/nowhere")
    assert typing("draft" + EDIT + ENTER) == ["draft"]
    assert "editor" in warnings[0].lower()


def test_ctrl_c_in_the_editor_is_the_editors(typing, editor):
    before = signal.getsignal(signal.SIGINT)
    editor(f'kill -INT {os.getpid()}; sleep 0.1; echo more >> "$2"')
    assert typing("draft" + EDIT + ENTER) == ["draft\nmore"]
    assert signal.getsignal(signal.SIGINT) is before


def test_escape_and_enter_send_the_text_in_vi_mode(typing):
    assert typing("a" + ESC + ENTER, vi=True) == ["a"]


def test_bytes_that_are_no_text_become_question_marks():
    with create_pipe_input() as source, create_app_session(source, DummyOutput()):
        source.send_bytes(b"a\xffb\r")
        assert ChatPrompt(None, {}, bar).read() == "a?b"


def test_colours_in_a_name_are_no_mouse(typing):
    """The prompt failed with "Unhandled exception in event loop", and waited for ever."""
    assert typing("/read a\x1b[31mb\x1b[0m.txt" + ENTER) == ["/read ab.txt"]
    assert typing("a\x1b[<0;1;1Mb\x1b[M !!c" + ENTER) == ["abc"]
