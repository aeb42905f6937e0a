"""The prompt, with keys from a pipe, and with a person's eyes: on an emulated screen."""

import fcntl
import os
import pty
import queue
import select
import signal
import struct
import termios
import threading
import time
from contextlib import contextmanager

import pyte
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.data_structures import Size
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.input.typeahead import clear_typeahead
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.output import DummyOutput
from prompt_toolkit.output.vt100 import Vt100_Output

from mixchat.chat.terminal.completion import FILES, CommandCompleter, CommandCompletion
from mixchat.chat.terminal.prompt import ChatPrompt, quoted_text

ENTER, CTRL_C, CTRL_D, CTRL_F, CTRL_J = "\r", "\x03", "\x04", "\x06", "\n"
CTRL_R, EDIT, ESC, TAB = "\x12", "\x18\x05", "\x1b", "\t"
ALT_ENTER, UP, DOWN, RIGHT = ESC + ENTER, ESC + "[A", ESC + "[B", ESC + "[C"
PASTE, PASTED = ESC + "[200~", ESC + "[201~"

COMMANDS = {
    "help": CommandCompletion("show this"),
    "load": CommandCompletion("load a file", FILES),
    "set": CommandCompletion("change a setting", lambda typed: ["temp", "top_p"]),
}


def bar():
    return "demo <b>&[x]"


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
    assert typing("  Hi <b>& [x] \r\r") == ["  Hi <b>& [x] ", ""]


@pytest.mark.parametrize(("key", "vi"), [(CTRL_J, False), (CTRL_J, True), (ALT_ENTER, False)])
def test_a_key_adds_a_line(typing, key, vi):
    assert typing("a" + key + "b" + ENTER, vi=vi) == ["a\nb"]


def test_newlines_at_the_end_are_not_sent(typing):
    assert typing("a" + CTRL_J + CTRL_J + ENTER) == ["a"]


@pytest.mark.parametrize("newline", ["\n", "\r", "\r\n"])
def test_pasted_lines_are_not_sent_before_enter(typing, newline):
    lines = newline.join(["a", "  b", "", "c", ""])
    assert typing(PASTE + lines + PASTED + "d" + ENTER) == ["a\n  b\n\nc\nd"]


def test_quotes_hold_several_lines(typing):
    assert typing('"""\ra\r  b\r\rc\r"""\rnext\r') == ["a\n  b\n\nc", "next"]


def test_quotes_that_were_pasted_open_are_closed_by_hand(typing):
    assert typing(PASTE + '"""Doc."\nx' + PASTED + ENTER + 'y"""' + ENTER) == ['Doc."\nx\ny']


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ('"""a"""', "a"),
        ('""""""', ""),
        (' """a""" ', "a"),
        ('"""a\nb"""', "a\nb"),
        ('"""\n  a\n"""', "  a"),
        ('"""\n\na\n\n"""', "\na\n"),
        ('"""\n"""Doc."""\nx\n"""', '"""Doc."""\nx'),
        ('"""', None),
        ('"""""', None),
        ('"""a', None),
        ('"""\na', None),
        ('a"""', None),
        ('"""Doc."""\nx = 1', None),
        ('"""a""" or """b"""', None),
        ('"""a""" is a string', None),
    ],
)
def test_what_stands_in_quotes(text, inner):
    assert quoted_text(text) == inner


@pytest.mark.parametrize("text", ['"""Doc."""\nx = 1', '"""a""" or """b"""', 'a"""', 'x = """a'])
def test_quotes_within_a_text_are_sent_with_it(typing, text):
    assert typing(PASTE + text + PASTED + ENTER) == [text]


def test_a_text_to_begin_with_can_be_changed(typing):
    assert typing("!" + ENTER, default="two\nlines") == ["two\nlines!"]


def test_ctrl_c_says_whether_there_was_text(typing):
    assert typing("a" + CTRL_C + CTRL_C + "b" + ENTER) == [("Ctrl-C", True), ("Ctrl-C", False), "b"]


def test_ctrl_d_deletes_text_if_there_is_some(typing):
    assert typing("ab\x01" + CTRL_D + ENTER) == ["b"]


@pytest.mark.parametrize(
    ("keys", "found"),
    [(UP + UP + UP + DOWN + "!" + ENTER, "b!"), (CTRL_R + "fi" + ENTER + ENTER, "find me")],
)
def test_what_was_sent_in_earlier_chats_is_found(typing, tmp_path, keys, found):
    typing("find me\rb\rc\r", history=tmp_path / "history")
    with look(history=tmp_path / "history") as screen:
        screen.type(keys)
        assert screen.read() == found


@pytest.mark.parametrize("key", [RIGHT, CTRL_F, "\x05"])
def test_a_key_takes_the_suggestion(typing, tmp_path, key):
    path = tmp_path / "history"
    typing("a long question\r", history=path)
    with look(history=path) as screen:
        screen.type("a lo")
        screen.wait_for("a long question")
        screen.type(key + ENTER)
        assert screen.read() == "a long question"


def test_a_history_that_cannot_be_saved_is_told_once(typing, tmp_path, warnings):
    assert typing("a\rb\r", history=tmp_path) == ["a", "b"]
    assert len(warnings) == 1
    assert str(tmp_path) in warnings[0]


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
    editor(f'cp "$2" "{tmp_path}/seen"; printf "two\\nlines\\n" > "$2"')
    assert typing("draft é" + EDIT + "!" + ENTER) == ["two\nlines!"]
    assert (tmp_path / "seen").read_text() == "draft é\n"


def test_v_in_vi_mode_opens_the_editor(typing, editor):
    editor('echo more >> "$2"')
    assert typing("draft" + ESC + "v" + ENTER, vi=True) == ["draft\nmore"]


def test_nobody_else_can_read_what_is_edited_and_it_is_gone_afterwards(typing, editor, tmp_path):
    editor(f'stat -c "%a %n" "$2" > "{tmp_path}/seen"')
    typing("secret" + EDIT + ENTER)
    mode, path = (tmp_path / "seen").read_text().split()
    assert mode == "600"
    assert path.endswith(".md")
    assert not os.path.exists(path)


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


def test_vi_keys(typing):
    assert typing("one two" + ESC + "0cesix" + ESC + "A!" + ENTER, vi=True) == ["six two!"]


def test_escape_and_enter_send_the_text_in_vi_mode(typing):
    assert typing("a" + ESC + ENTER, vi=True) == ["a"]


def test_bytes_that_are_no_text_become_question_marks():
    with create_pipe_input() as source, create_app_session(source, DummyOutput()):
        source.send_bytes(b"a\xffb\r")
        assert ChatPrompt(None, {}, bar).read() == "a?b"


class Eyes:
    """A screen of `width` columns, and hands: a prompt at it reads in a thread of its own."""

    def __init__(self, width, rows, options):
        self._screen = pyte.Screen(width, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._master, self.slave = pty.openpty()
        self._screen.write_process_input = self.type  # answers with the cursor's place
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, width, 0, 0))
        self._read = queue.Queue()
        self._out = os.fdopen(os.dup(self.slave), "w", encoding="utf-8")
        self._in = os.fdopen(os.dup(self.slave), encoding="utf-8")
        output = Vt100_Output(self._out, lambda: Size(rows, width), term="xterm")
        options = {"history": None, "commands": COMMANDS, "status": bar} | options
        self._source = Vt100Input(self._in)
        with create_app_session(self._source, output):
            self.prompt = ChatPrompt(**options)
        self._thread = None

    def ask(self):
        """Begin to read."""
        self._thread = threading.Thread(target=self._reading, daemon=True)
        self._thread.start()

    def _reading(self):
        try:
            self._read.put(self.prompt.read())
        except (KeyboardInterrupt, EOFError) as error:
            self._read.put(error)

    def type(self, text):
        os.write(self._master, text if isinstance(text, bytes) else text.encode())

    def read(self):
        """Return the line that the prompt has read."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self._look()
            if not self._read.empty():
                self._thread.join()
                return self._read.get()
        raise AssertionError(f"nothing was read; the screen: {self.lines}")

    def wait_for(self, text, there=True):
        """Wait until `text` is on the screen, or no longer."""
        deadline = time.monotonic() + 60
        while any(text in line for line in self.lines) != there:
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for {text!r}; the screen: {self.lines}")
            self._look()

    @property
    def lines(self):
        return [line.rstrip() for line in self._screen.display if line.strip()]

    def reversed(self, text):
        """Return whether the line with `text` is drawn in reverse."""
        number = next(n for n, line in enumerate(self._screen.display) if text in line)
        return self._screen.buffer[number][0].reverse

    def _look(self):
        if select.select([self._master], [], [], 0.02)[0]:
            self._stream.feed(os.read(self._master, 65536))

    def close(self):
        if self._thread and self._thread.is_alive():
            self.type(CTRL_C * 3)  # one may only end a search
            deadline = time.monotonic() + 60
            while self._thread.is_alive() and time.monotonic() < deadline:
                self._look()  # a full terminal would keep it from writing
        clear_typeahead(self._source)  # the next test's terminal may have the same number
        for file in (self._in, self._out):
            file.close()
        os.close(self._master)
        os.close(self.slave)


@contextmanager
def look(width=60, rows=12, ask=True, **options):
    eyes = Eyes(width, rows, options)
    try:
        if ask:
            eyes.ask()
            eyes.wait_for(">>>")
        yield eyes
    finally:
        eyes.close()


def test_the_bottom_line_shows_its_text_as_it_is_below_no_room_for_a_menu():
    with look() as screen:
        screen.wait_for("demo <b>&[x]")
        assert screen.reversed("demo")
        assert [line[:4] for line in screen.lines] == [">>>", "demo"]


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


def test_colours_in_a_name_are_no_mouse(typing):
    """The prompt failed with "Unhandled exception in event loop", and waited for ever."""
    assert typing("/read a\x1b[31mb\x1b[0m.txt" + ENTER) == ["/read ab.txt"]
    assert typing("a\x1b[<0;1;1Mb\x1b[M !!c" + ENTER) == ["abc"]


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


def test_several_lines_from_before_the_prompt_are_sent_one_after_the_other():
    """They were put together into one that waited: commands among them became text."""
    with look(ask=False) as screen:
        screen.type("one é" + ENTER + "/two" + ENTER + ENTER + "thr")
        screen.ask()
        assert screen.read() == "one é"
        screen.ask()
        assert screen.read() == "/two"
        screen.ask()
        assert screen.read() == ""
        screen.ask()
        screen.wait_for(">>> thr")
        screen.type("ee" + ENTER)
        assert screen.read() == "three"


def test_ctrl_d_from_before_the_prompt_leaves_after_what_was_typed_before_it():
    with look(ask=False) as screen:
        screen.type("one" + ENTER + CTRL_D)
        screen.ask()
        assert screen.read() == "one"
        screen.ask()
        assert isinstance(screen.read(), EOFError)


def test_enter_alone_from_before_the_prompt_is_only_impatience():
    with look(ask=False) as screen:
        screen.type(ENTER + ENTER + "one" + ENTER)
        screen.ask()
        assert screen.read() == "one"


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


def test_half_a_line_from_before_the_prompt_continues():
    with look(ask=False) as screen:
        screen.type("one ")
        screen.ask()
        screen.wait_for(">>> one")
        screen.type("two" + ENTER)
        assert screen.read() == "one two"


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1"), ("TERM", "")])
def test_any_terminal_will_do(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with create_pipe_input() as source, create_app_session(source, DummyOutput()):
        source.send_text("/load \t!" + ENTER + "a" + CTRL_J + "b" + ENTER)
        prompt = ChatPrompt(None, COMMANDS, bar)
        assert [prompt.read(), prompt.read()] == ["/load !", "a\nb"]
