"""The completions that are offered at each point of a command."""

import os

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mixchat.chat.terminal.completion import (
    CommandCompleter,
    CommandCompletion,
    file_argument,
    file_names,
)


def settings(typed):
    return ["temp", "top_p", "seed"] if " " not in typed else ["temp 0", "temp 0.7"]


def unreadable(typed):
    raise PermissionError


COMMANDS = {
    "help": CommandCompletion("show this"),
    "set": CommandCompletion("change a setting", settings),
    "load": CommandCompletion("load a file", file_names),
    "locked": CommandCompletion("fails", unreadable),
}


def completions(text):
    event = CompleteEvent(text_inserted=True)
    return list(CommandCompleter(COMMANDS).get_completions(Document(text), event))


def results(text):
    """The lines that taking each completion would make."""
    return [
        text[: len(text) + completion.start_position] + completion.text
        for completion in completions(text)
    ]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A directory to be in, and a home."""
    for name in ("one.txt", "two words.txt", ".hidden", "Other"):
        (tmp_path / name).touch()
    (tmp_path / "sub dir").mkdir()
    (tmp_path / "sub dir" / "deep.md").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "sub dir"))
    return tmp_path


def test_a_slash_offers_all_commands_with_their_help():
    offered = completions("/")
    assert [item.display_text for item in offered] == ["/help", "/set", "/load", "/locked"]
    assert [item.text for item in offered] == ["help", "set ", "load ", "locked "]
    assert offered[0].display_meta_text == "show this"


@pytest.mark.parametrize(
    "text",
    ["", "help", "what is /h", " /h", "/etc/hosts is empty", "/nothing x", "/help x", "/h\nmore"],
)
def test_text_that_is_not_a_command_is_left_alone(text):
    assert results(text) == []


def test_arguments_are_the_ones_that_go_on_with_what_was_typed():
    assert results("/set ") == ["/set temp", "/set top_p", "/set seed"]
    assert results("/set T") == ["/set temp", "/set top_p"]
    assert results("/set temp 0.") == ["/set temp 0.7"]


def test_arguments_that_cannot_be_found_out_are_not_offered():
    assert results("/locked ") == []


def test_files_come_with_directories_marked_and_hidden_ones_on_request(files):
    assert results("/load ") == [
        "/load Other",
        "/load one.txt",
        "/load sub dir/",
        "/load two words.txt",
    ]
    assert results("/load .") == ["/load .hidden"]
    assert results("/load sub dir/") == ["/load sub dir/deep.md"]


def test_the_menu_shows_the_last_part_of_a_path(files):
    for typed, shown in (
        ("sub dir/d", "deep.md"),
        ("./su", "sub dir/"),
        ("'sub dir/d", "deep.md'"),
    ):
        assert [item.display_text for item in completions(f"/load {typed}")] == [shown]


def test_the_home_directory_stays_a_tilde(files):
    assert results("/load ~/") == ["/load ~/deep.md"]
    assert file_argument("~/deep.md") == files / "sub dir" / "deep.md"


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_quote_is_closed_after_a_file_and_not_after_a_directory(files, quote):
    assert list(file_names(f"{quote}two")) == [f"{quote}two words.txt{quote}"]
    assert list(file_names(f"{quote}su")) == [f"{quote}sub dir/"]


@pytest.mark.parametrize(
    "name", ["plain", "two words", "'quoted'", '"', "~", "~root", "a'b", "é模"]
)
def test_a_completed_name_means_the_file(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("this one")
    monkeypatch.chdir(tmp_path)
    for quote in ("", "'", '"'):
        for offered in file_names(quote):
            assert file_argument(offered).read_text() == "this one"


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", b"a\xff"])
def test_a_name_that_cannot_be_shown_is_not_offered(tmp_path, name):
    (tmp_path / os.fsdecode(name)).touch()
    assert list(file_names(f"{tmp_path}/")) == []


@pytest.mark.parametrize("text", ["missing/", "one.txt/", "loop/x", "\0", "~nobody-here/"])
def test_what_cannot_be_read_has_no_files(files, text):
    (files / "loop").symlink_to("loop")
    assert list(file_names(text)) == []


def test_a_link_in_a_circle_is_a_name_like_others(files):
    (files / "loop").symlink_to("loop")
    assert list(file_names("lo")) == ["loop"]


def test_a_directory_of_very_many_files_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("mixchat.chat.terminal.completion._MAX_FILES", 3)
    for number in range(9):
        (tmp_path / str(number)).touch()
    assert len(list(file_names(f"{tmp_path}/"))) == 3


def test_an_argument_may_have_a_text_next_to_it():
    """The IDs of /load said nothing of the chats."""
    about = CommandCompletion("load a chat", lambda typed: [("mine", "What is a\nmixture?")])
    event, document = CompleteEvent(text_inserted=True), Document("/load m")
    (found,) = CommandCompleter({"load": about}).get_completions(document, event)
    assert (found.text, found.display_meta_text) == ("mine", "What is a mixture?")
