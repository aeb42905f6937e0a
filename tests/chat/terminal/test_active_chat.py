"""The chat in the terminal, with keys from a pipe in place of a keyboard."""

import os
import signal
import time

import pytest
from chat_typing import CTRL_C, CTRL_D, Chat, error_of, prompts_of, typed

from mixchat.base.errors import PromptError, ResourceError
from mixchat.chat.saved.chat_store import ChatStore
from mixchat.chat.terminal.input_history import InputHistory


@pytest.mark.parametrize("leave", ["/bye\r", "  /bye \r", "/exit\r", CTRL_D, "\r" + CTRL_C * 2])
def test_it_answers_turn_after_turn_until_the_user_leaves(session_of, leave):
    session = session_of("Hello", "Fine")
    chat = Chat(session, "Hi\rHow are you?\r" + leave)
    assert chat.text.startswith("Hello\n\nFine\n\n")
    assert prompts_of(session)[1] == "[user]Hi[assistant]Hello[user]How are you?"
    assert [turn.reason for turn in chat.turns] == ["stop", "stop"]


def test_ctrl_c_after_typing_again_does_not_leave(session_of):
    session = session_of("Hello")
    Chat(session, "one" + CTRL_C + "two" + CTRL_C + "Hi\r" + CTRL_D)
    assert prompts_of(session) == ["[user]Hi"]


@pytest.mark.parametrize(("keys", "notes"), [("one", 0), ("one" + CTRL_C, 1), ("", 1)])
def test_only_ctrl_c_at_an_empty_line_says_that_another_one_leaves(session_of, keys, notes):
    """It said so when it had cleared the line, and the next one left."""
    session = session_of("Hello")
    chat = Chat(session, keys + CTRL_C + "Hi\r" + CTRL_D)
    assert chat.text.count("Ctrl-C again") == notes
    assert prompts_of(session) == ["[user]Hi"]


def test_only_commands_that_worked_are_suggested_and_saved(session_of, tmp_path):
    """A command with a typing error was suggested for ever."""
    session, path = session_of("Hello", "So it is"), tmp_path / "history"
    lines = ["/undo 99", "/show", "/show", "Hi", "/undo 9", "/undo", "/undo", " /set temp 1"]
    keys = "".join(f"{line}\r" for line in [*lines, "/etc/hosts is empty", "/nosuch"])
    suggest = Chat(session, keys + CTRL_D, history=path).prompt.history.suggested
    assert [suggest(start) for start in ("/u", "/s", "/e", "/n", "H")] == [
        *("ndo", "how", "tc/hosts is empty", "", "i")
    ]
    saved = reversed(list(InputHistory(path).load_history_strings()))
    assert list(saved) == ["/show", "Hi", "/undo", "/etc/hosts is empty"]


def test_ctrl_c_right_after_enter_stops_the_answer_and_does_not_leave(session_of, tmp_path):
    """It was taken for a key at the next prompt, if it came before the prompt's end: the answer was
    given, and another Ctrl-C would have left."""
    (tmp_path / "a").write_text("text")
    read = f"/read {tmp_path / 'a'}\r"
    for first, said in ((CTRL_C, "leaves)\n(stopped)\n\n"), (read, "still goes before the next")):
        session = session_of("Fine")
        chat = Chat(session, first + "Hi\r" + CTRL_C + "And?\r" + CTRL_D)
        assert said in chat.text
        file = "text\n\n" if first == read else ""  # it was not lost
        assert prompts_of(session) == [f"[user]{file}And?"]


def test_a_turn_that_fails_does_not_rewrite_the_chat(session_of, tmp_path):
    store = ChatStore(tmp_path)
    session = session_of("Hello", [RuntimeError("out of order")])
    written = []
    store.save = lambda chat, name: written.append(chat) or chat
    Chat(session, "Hi\rAgain\r" + CTRL_D, store=store)
    assert len(written) == 1


def full_store(tmp_path, attempts):
    """A store on a disk that is full for the first `attempts` to save."""
    store = ChatStore(tmp_path)
    save, numbers = store.save, iter(range(attempts))

    def attempt(chat, name):
        if next(numbers, None) is not None:
            raise ResourceError("the chat cannot be saved")
        return save(chat, name)

    store.save = attempt
    return store


@pytest.mark.parametrize("leave", ["/bye", "/clear", CTRL_D])
def test_a_chat_that_cannot_be_saved_is_not_lost_before_a_person_repeats_it(
    session_of, tmp_path, leave
):
    """It was lost at once, and its exit code was 0."""
    session = session_of("Hello", "Fine")
    export = f"/export {tmp_path / 'saved.md'}"
    chat = typed(session, "Hi", leave, export, leave, store=full_store(tmp_path, attempts=99))
    assert [error.hint and "/export" in error.hint for error in chat.errors] == [None, True]
    assert "Hello" in (tmp_path / "saved.md").read_text()
    assert bool(session.history) == (leave != "/clear")
    assert (chat.saver.fault is None) == (leave == "/clear")


def test_a_chat_is_saved_at_its_end_if_the_disk_has_space_again(session_of, tmp_path):
    chat = typed(session_of("Hello"), "Hi", store=full_store(tmp_path, attempts=1))
    assert "cannot be saved" in error_of(chat)
    assert [saved.turns for saved in chat.saver.store.all()] == [1]
    assert chat.saver.fault is None


def test_a_quoted_question_that_looks_like_a_command_stays_one_when_it_is_edited(session_of):
    session = session_of("a", "b")
    Chat(session, '"""/bye"""\r/edit\r\r' + CTRL_D)
    assert prompts_of(session) == ["[user]/bye", "[user]/bye"]


@pytest.mark.parametrize(
    ("answer", "note"), [("", "ended the answer at once"), ("Hello", "is full")]
)
def test_an_answer_that_is_not_whole_says_so(session_of, answer, note):
    session = session_of(answer, context_size=10, max_tokens=0)
    assert note in Chat(session, "Hi\r" + CTRL_D).text


def test_a_full_context_is_told_once(session_of):
    """Two lines said it, one after the other, each with a part of what to do."""
    session = session_of("a", "Hello" * 9, context_size=40, max_tokens=0)
    text = Chat(session, "Hi\rAgain\r" + CTRL_D).text
    assert text.count("context") == 1
    assert "/clear starts a new chat, /set overflow drop-oldest leaves old turns out)" in text


@pytest.mark.parametrize("error", [PromptError("too long"), RuntimeError("broken")])
def test_a_failing_turn_is_reported_and_the_chat_continues(session_of, error):
    session = session_of([*"Hal", error], "Fine")
    chat = Chat(session, "Hi\rAgain\r" + CTRL_D)
    assert chat.errors == [error]
    assert chat.text == "Hal\nFine\n\n"
    assert prompts_of(session)[1] == "[user]Again"


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("said", "note", "turn"),
    [
        ("Hel", "Hel\n(stopped; /continue resumes it)", "[user]Hi[assistant]Hel"),
        ("", "(stopped)", ""),
    ],
)
def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(session_of, said, note, turn):
    session = session_of([*said, press_ctrl_c, *"never seen"], "Fine")
    before = signal.getsignal(signal.SIGINT)
    chat = Chat(session, "Hi\rGo on\r" + CTRL_D)
    assert chat.text == f"{note}\n\nFine\n\n"
    assert prompts_of(session)[1] == f"{turn}[user]Go on"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_does_not_wait_long_for_a_token(session_of):
    waited = []

    def sleep():
        start = time.monotonic()
        try:
            time.sleep(120)
        finally:
            waited.append(time.monotonic() - start)

    session = session_of(["H", press_ctrl_c, sleep, *"ello"])
    chat = Chat(session, "Hi\r" + CTRL_D)
    assert chat.text.startswith("H\n(stopped; /continue resumes it)")
    assert session.history[-1].content == "H"
    assert 0.2 < waited[0] < 60


def test_ctrl_c_between_answer_and_prompt_does_not_leave(session_of):
    session = session_of("Hello", "Fine")
    pressed = []

    def press_once(finished):
        if not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    chat = Chat(session, "Hi\rAgain\r" + CTRL_D, after_turn=press_once)
    assert "Fine" in chat.text
