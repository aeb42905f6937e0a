"""/copy, /read and /export: what comes out of files, and what goes into them."""

import base64
import json
import os

import pytest
from chat_typing import error_of, prompts_of, typed

from mixchat.chat.terminal import other_programs
from mixchat.chat.terminal.commands import completions

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_copy_takes_the_answer_or_its_last_code(session_of, monkeypatch):
    copied = []
    monkeypatch.setattr(
        "mixchat.chat.terminal.commands.copy", lambda text, out: copied.append(text) or "ok"
    )
    answer = "Do\n\n```sh\nls\n```\n\nthen\n\n- as in\n\n  ```py\n  x = 1\n  ```\n"
    typed(session_of(answer), "Hi", "/copy", "/copy code")
    assert copied == [answer, "x = 1\n"]


def test_copy_says_why_it_cannot(session_of):
    assert error_of(typed(session_of(), "/copy")) == "nothing has been answered yet"
    assert "no code block" in error_of(typed(session_of("text"), "Hi", "/copy code"))


def test_without_a_tool_the_terminal_is_asked_to_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    master, slave = os.openpty()
    with open(slave, "w") as terminal:
        assert "terminal" in other_programs.copy("naïve", terminal)
        sent = os.read(master, 1000)
    os.close(master)
    assert sent == b"\x1b]52;c;" + base64.b64encode("naïve".encode()) + b"\x07"


def test_a_tool_of_the_desktop_gets_the_text(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "wl-copy"
    tool.write_text(f"#!/bin/sh\n/bin/cat > {tmp_path}/clipboard\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert other_programs.copy("naïve", None) == "copied"
    assert (tmp_path / "clipboard").read_text() == "naïve"


def test_a_file_goes_before_the_next_question_once(session_of, tmp_path):
    (tmp_path / "my notes.txt").write_text("All of them.\n")
    session = session_of("a", "b")
    chat = typed(session, "/read my notes.txt", "Summarise", "Again")
    assert "(my notes.txt, 12 characters, goes before the next question)" in chat.text
    assert prompts_of(session)[0] == "[user]All of them.\n\nSummarise"
    assert prompts_of(session)[1].endswith("[user]Again")


def test_what_was_read_is_dropped_by_clear_by_load_and_by_read_none(session_of, store, tmp_path):
    """It went before the next question whatever happened, and one too long ended the chat."""
    (tmp_path / "notes").write_text("All")
    session = session_of("a", "b", "c", "d")
    for command in ("/clear", "/load mine", "/read none"):
        typed(session, "Hi", "/save mine", "/read notes", command, "Why", store=store)
        assert prompts_of(session)[-1].endswith("[user]Why")
        session.clear()
        store.remove("mine")
        session.engine.script = ["a", "b"]


def test_read_does_not_wait_for_a_fifo(session_of, tmp_path):
    """Nobody writes to it, so the chat waited for ever."""
    os.mkfifo(tmp_path / "fifo")
    assert error_of(typed(session_of(), f"/read {tmp_path / 'fifo'}")).endswith("is not a file")


def test_an_export_that_fails_leaves_no_file(session_of, tmp_path, monkeypatch):
    monkeypatch.setattr("mixchat.chat.terminal.commands.to_markdown", lambda chat: "\ud800")
    typed(session_of("a"), "Hi", "/export out.md")
    assert not (tmp_path / "out.md").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a\0b", "not text"),
    ],
)
def test_a_file_that_is_not_text_is_refused(session_of, tmp_path, content, said):
    if content is not None:
        (tmp_path / "notes").write_bytes(content)
    assert said in error_of(typed(session_of(), "/read notes"))


@pytest.mark.parametrize("name", ["out.md", "out.json", ""])
def test_export_writes_the_chat_once(session_of, store, tmp_path, name):
    session = session_of("Hello", "Fine")
    chat = typed(session, "Hi", f"/export {name}", f"/export {name}", store=store)
    (path,) = tmp_path.glob("*.json" if name.endswith("json") else "*.md")
    assert f"(written to {path.name})" in chat.text
    assert error_of(chat) == f"/export {path.name}: the file exists already"
    if name.endswith("json"):
        assert [m["content"] for m in json.loads(path.read_text())["messages"]] == ["Hi", "Hello"]
    else:
        assert "Hello" in path.read_text()


def test_of_a_file_that_cannot_fit_no_more_is_read_than_would(session_of, tmp_path):
    """/read of an endless file took all memory."""
    with open(tmp_path / "endless", "wb") as file:
        file.truncate(10**12)  # a hole: it takes no disk
    error = error_of(typed(session_of(context_size=10), "/read endless"))
    assert "endless is too long: more than 1.28 kB, but the context holds 10 tokens" in error


def test_a_file_is_named_and_not_lost_if_the_question_fails(session_of, tmp_path):
    (tmp_path / "notes").write_text("All")
    session = session_of([RuntimeError("out of order")], "a")
    text = typed(session, "/read notes", "Why", "Why").text
    assert "(notes still goes before the next question; /read none drops it)" in text
    assert prompts_of(session)[1] == "[user]All\n\nWhy"


def test_a_kept_prompt_asks_with_the_files_and_with_lines_as_its_input(
    session_of, tmp_path, monkeypatch
):
    monkeypatch.setenv("MIXCHAT_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/review.md").write_text("Review: {{input}}")
    (tmp_path / "x.py").write_text("x = 1")
    session = session_of("Fine", "Good")
    lines = ("/prompt", "/read x.py", "/prompt review", "/prompt review a\x0ab", "/prompt reviw x")
    chat = typed(session, *lines)
    assert chat.text.startswith("review\n")
    assert [m.content for m in session.history[::2]] == ["Review: x = 1", "Review: a\nb"]
    assert chat.active.attached == {}
    assert error_of(chat) == "there is no prompt 'reviw'"
    assert list(completions(chat.active)["prompt"].argument("")) == ["review"]
