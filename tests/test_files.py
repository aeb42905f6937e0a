"""Small files: only regular ones are read, and one that is written is there whole or not at all."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from mixchat.errors import CheckpointError, UsageError
from mixchat.files import open_regular, read_bytes, write_error, write_file, write_private_file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")  # a read of it would never end


@pytest.fixture(params=[fifo, a_socket, device])
def irregular(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Something under a file's name that is not a file. (The path of a socket has to be short.)"""
    monkeypatch.chdir(tmp_path)
    request.param(Path("thing"))
    return Path("thing")


def test_what_is_not_a_regular_file_is_not_read(irregular: Path) -> None:
    """A checkpoint whose config.json was a FIFO hung for ever, and /dev/zero filled the memory."""
    with pytest.raises(CheckpointError, match=r"thing: cannot be read \(is not a regular file\)"):
        read_bytes(irregular)


def test_a_directory_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_bytes(tmp_path)


def test_a_link_is_followed_only_where_it_may_be(tmp_path: Path) -> None:
    """huggingface_hub's cache is made of links; among our own files there is none."""
    (tmp_path / "file").write_bytes(b"data")
    link = tmp_path / "link"
    link.symlink_to("file")
    assert read_bytes(link) == b"data"
    with pytest.raises(CheckpointError, match=r"link: cannot be read \(is a symbolic link\)"):
        read_bytes(link, follow=False)


def test_nothing_stays_open_where_opening_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with pytest.raises(FileExistsError):
            open_regular(tmp_path / "fifo")
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("write", [write_file, write_private_file])
class TestWriting:
    def test_a_link_is_replaced_and_what_it_names_is_left_as_it_is(
        self, tmp_path: Path, write: Callable[[Path, bytes], None]
    ) -> None:
        """A link to another's file, where a file of ours belongs, was written through."""
        precious, link = tmp_path / "precious", tmp_path / "report.json"
        precious.write_text("precious")
        link.symlink_to(precious)
        write(link, b"data")
        assert (precious.read_text(), link.read_bytes()) == ("precious", b"data")
        assert not link.is_symlink()

    def test_what_is_not_a_regular_file_is_left_as_it_is(
        self, tmp_path: Path, write: Callable[[Path, bytes], None]
    ) -> None:
        """A device's name was given to a file of ours, as root."""
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(OSError, match="is not a regular file") as caught:
            write(tmp_path / "fifo", b"data")
        assert type(write_error(caught.value, tmp_path, "")) is UsageError
        assert (tmp_path / "fifo").is_fifo()
        assert os.listdir(tmp_path) == ["fifo"]

    def test_a_full_disk_leaves_nothing_behind_and_the_old_file_as_it_was(
        self, tmp_path: Path, write: Callable[[Path, bytes], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After a run on a full disk stats/demo.json.tmp was left."""
        write(tmp_path / "file", b"old")

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "file", b"new")
        assert os.listdir(tmp_path) == ["file"]
        assert (tmp_path / "file").read_bytes() == b"old"


def test_a_private_file_is_its_owners_alone(tmp_path: Path) -> None:
    write_private_file(tmp_path / "file", b"data")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
