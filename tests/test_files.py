"""Small files: only regular ones are read, and one that is written is there whole or not at all."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mixchat.errors import CheckpointError
from mixchat.files import open_regular, read_bytes


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
