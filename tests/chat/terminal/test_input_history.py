"""Lines that were typed, from one chat to the next."""

import os
import stat
import subprocess
import sys

import pytest
from patience import PATIENCE_S

from mixchat.chat.terminal import input_history
from mixchat.chat.terminal.input_history import InputHistory


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "history"


def keep(path, *entries):
    history = InputHistory(path)
    for entry in entries:
        history.append_string(entry)
    return history


def saved(path):
    """The lines that a new chat finds, the oldest first."""
    history = InputHistory(path)
    assert history.fault is None
    return list(history.load_history_strings())[::-1]


def rights(path):
    return stat.S_IMODE(path.stat().st_mode)


ODD = ["two\nlines", "\n", "a\n\n# no comment\n+b", "é 模 🙂", "line\u2028separator\x85\x0c", "\r"]


def test_entries_come_back_as_they_were(path):
    keep(path, "one", *ODD)
    assert saved(path) == ["one", *ODD]


def test_only_the_owner_can_read_them(path):
    before = os.umask(0)
    try:
        keep(path, "secret")
    finally:
        os.umask(before)
    assert (rights(path), rights(path.parent)) == (0o600, 0o700)


def test_a_file_with_other_rights_gets_the_right_ones(path):
    path.parent.mkdir(mode=0o755)
    path.touch(mode=0o644)
    assert saved(path) == []
    assert rights(path) == 0o600
    assert rights(path.parent) == 0o755


def test_a_line_that_begins_with_a_space_is_not_saved(path):
    assert list(keep(path, "one", " secret").load_history_strings()) == ["one"]
    assert saved(path) == ["one"]


def test_equal_neighbours_are_saved_once(path):
    keep(path, "one", "one", "two", "one")
    keep(path, "one")
    assert saved(path) == ["one", "two", "one"]


def test_without_a_file_it_remembers_until_it_ends():
    assert list(keep(None, "one", "two").load_history_strings()) == ["two", "one"]


def test_the_newest_stay_if_there_are_too_many(path, monkeypatch):
    monkeypatch.setattr(input_history, "_MAX_ENTRIES", 3)
    keep(path, *"abcde")
    assert saved(path) == ["c", "d", "e"]
    assert path.read_text().count("+") == 3
    assert rights(path) == 0o600
    assert os.listdir(path.parent) == ["history"]


def test_a_file_that_is_too_long_keeps_its_end(path, monkeypatch):
    monkeypatch.setattr(input_history, "_MAX_FILE_BYTES", 500)
    keep(path, *(f"é number {number}" for number in range(100)))
    entries = saved(path)
    assert entries[-1] == "é number 99"
    assert 2 < len(entries) < 20
    assert path.stat().st_size < 500


def test_a_link_in_its_place_is_left_as_it_is(path, tmp_path):
    """Whoever could write into the directory could have what is typed appended to any file."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    path.parent.mkdir()
    path.symlink_to(precious)
    history = keep(path, "one")
    assert history.fault == f"{path}: is a symbolic link: what you type is not saved there"
    assert list(history.load_history_strings()) == ["one"]
    assert path.is_symlink()
    assert (precious.read_text(), rights(precious)) == ("precious", 0o644)


def test_an_entry_that_is_added_after_another_chat_shortened_the_file_is_there(path, monkeypatch):
    first = keep(path, *"abcd")
    monkeypatch.setattr(input_history, "_MAX_ENTRIES", 2)
    InputHistory(path)
    first.append_string("e")
    assert saved(path) == ["d", "e"]


MANY = """
import sys
from pathlib import Path
from mixchat.chat.terminal import input_history
input_history._MAX_ENTRIES = 80
for number in range(40):
    history = input_history.InputHistory(Path(sys.argv[1]))
    history.append_string(f"{sys.argv[2]}{number}\\nsecond line")
"""


def test_chats_that_start_and_write_at_the_same_time_lose_nothing(path):
    keep(path, *(f"old{number}" for number in range(80)))
    others = [subprocess.Popen([sys.executable, "-c", MANY, path, name]) for name in "xy"]
    assert [other.wait(PATIENCE_S) for other in others] == [0, 0]
    wanted = [f"{name}{number}\nsecond line" for name in "xy" for number in range(40)]
    assert sorted(saved(path)[-80:]) == sorted(wanted)


def no_directory(path):
    path.parent.touch()


def a_directory(path):
    path.mkdir(parents=True)


def a_pipe(path):
    path.parent.mkdir()
    os.mkfifo(path)


NOT_TEXT = b"\n# then\n+\xff\xfe\n"


def not_text(path):
    path.parent.mkdir()
    path.write_bytes(NOT_TEXT)


@pytest.mark.parametrize("obstacle", [no_directory, a_directory, a_pipe, not_text])
def test_a_file_that_cannot_be_used_leaves_the_memory(path, obstacle):
    obstacle(path)
    history = keep(path, "one", "two")
    assert str(path) in history.fault
    assert "not saved" in history.fault
    assert list(history.load_history_strings()) == ["two", "one"]
    assert not path.is_file() or path.read_bytes() == NOT_TEXT  # as it was


def test_a_read_only_disk_still_gives_what_was_saved(path, monkeypatch):
    keep(path, "old")
    opened = os.open

    def read_only(name, flags, *mode):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system")
        return opened(name, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    history = keep(path, "new")
    assert "Read-only" in history.fault
    assert list(history.load_history_strings()) == ["new", "old"]


def test_a_disk_that_fills_up_leaves_no_half_entry(path, monkeypatch):
    history = keep(path, "one")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:-2]))
    history.append_string("é" * 50)
    assert "full" in history.fault
    monkeypatch.undo()
    history.append_string("in memory")
    assert saved(path) == ["one"]
    assert list(history.load_history_strings()) == ["in memory", "é" * 50, "one"]


def test_bytes_that_are_no_text_are_saved_as_question_marks(path):
    keep(path, "a\udcffb")
    assert saved(path) == ["a?b"]
