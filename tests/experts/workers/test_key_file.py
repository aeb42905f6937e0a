"""The key of workers: it is made once, for its owner only, and any other file is refused."""

import os
import stat

import pytest

from mixchat.base.errors import UsageError
from mixchat.experts.workers.key_file import default_key_file, make_key_file, read_key_file


def test_a_new_key_is_random_and_for_its_owner_only(tmp_path):
    first, second = tmp_path / "data" / "worker.key", tmp_path / "other.key"
    make_key_file(first)
    make_key_file(second)
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert len(read_key_file(first)) == 32
    assert read_key_file(first) != read_key_file(second)
    assert first.read_text() == read_key_file(first).hex() + "\n"


def test_the_key_s_place_is_the_data_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    assert default_key_file() == tmp_path / "worker.key"


def test_a_key_is_not_overwritten(tmp_path):
    path = tmp_path / "worker.key"
    make_key_file(path)
    key = read_key_file(path)
    with pytest.raises(UsageError, match="a key already"):
        make_key_file(path)
    assert read_key_file(path) == key


def test_a_link_is_not_followed_to_make_a_key(tmp_path):
    (tmp_path / "worker.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="a key already"):
        make_key_file(tmp_path / "worker.key")
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_key_says_how_to_make_one(tmp_path):
    with pytest.raises(UsageError, match="there is no key") as caught:
        read_key_file(tmp_path / "worker.key")
    assert "mixchat worker --new-key" in (caught.value.hint or "")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_key_that_others_can_read_or_write_is_refused(tmp_path, mode):
    path = tmp_path / "worker.key"
    make_key_file(path)
    path.chmod(mode)
    with pytest.raises(UsageError, match=f"its mode is {mode:o}") as caught:
        read_key_file(path)
    assert f"chmod 600 {path}" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "ab", "ab" * 31, "ab" * 33, "zz" * 32, "ab" * 5000, "é" * 32])
def test_another_file_is_not_a_key(tmp_path, text):
    path = tmp_path / "worker.key"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="not a key"):
        read_key_file(path)


def test_a_key_may_have_been_copied_by_hand(tmp_path):
    path = tmp_path / "worker.key"
    path.write_text(f"  {'AB' * 32}\r\n")
    path.chmod(0o600)
    assert read_key_file(path) == b"\xab" * 32


def test_a_key_is_read_from_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "worker.key", 0o600)
    with pytest.raises(UsageError, match="cannot be read"):
        read_key_file(tmp_path / "worker.key")
