"""Small files: only regular ones are read, and each is written whole or not at all."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from mixchat.base.errors import CheckpointError, UsageError
from mixchat.base.files import open_regular, read_bytes, write_error, write_file, write_private_file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")  # a read of it would never end


@pytest.fixture(params=[fifo, a_socket, device])
def irregular(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Something that is not a regular file. (The path of a socket has to be short.)"""
    monkeypatch.chdir(tmp_path)
    request.param(Path("thing"))
    return Path("thing")


def test_only_a_regular_file_is_read(irregular):
    """A checkpoint whose config.json was a FIFO hung forever, and /dev/zero filled the memory."""
    with pytest.raises(CheckpointError, match=r"thing: cannot be read \(is not a regular file\)"):
        read_bytes(irregular)


def test_a_directory_is_not_read(tmp_path):
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_bytes(tmp_path)


def test_a_link_is_followed_only_where_that_is_allowed(tmp_path):
    """huggingface_hub's cache consists of links; mixchat's own files are none."""
    (tmp_path / "file").write_bytes(b"data")
    link = tmp_path / "link"
    link.symlink_to("file")
    assert read_bytes(link) == b"data"
    with pytest.raises(CheckpointError, match=r"link: cannot be read \(is a symbolic link\)"):
        read_bytes(link, follow=False)


def test_a_refused_file_is_closed_again(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with pytest.raises(FileExistsError):
            open_regular(tmp_path / "fifo")
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("write", [write_file, write_private_file])
class TestWriting:
    def test_a_link_is_replaced_and_its_target_is_not_changed(self, tmp_path, write):
        """A link in place of our file was followed, and its target overwritten."""
        precious, link = tmp_path / "precious", tmp_path / "report.json"
        precious.write_text("precious")
        link.symlink_to(precious)
        write(link, b"data")
        assert (precious.read_text(), link.read_bytes()) == ("precious", b"data")
        assert not link.is_symlink()

    def test_anything_but_a_regular_file_is_not_replaced(self, tmp_path, write):
        """As root, a device was replaced by our file."""
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(OSError, match="is not a regular file") as caught:
            write(tmp_path / "fifo", b"data")
        assert type(write_error(caught.value, tmp_path, "")) is UsageError
        assert (tmp_path / "fifo").is_fifo()
        assert os.listdir(tmp_path) == ["fifo"]

    def test_a_full_disk_leaves_no_temporary_file_and_the_old_file_unchanged(
        self, tmp_path, write, monkeypatch
    ):
        """After a run on a full disk stats/demo.json.mixchat.tmp remained."""
        write(tmp_path / "file", b"old")

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "file", b"new")
        assert os.listdir(tmp_path) == ["file"]
        assert (tmp_path / "file").read_bytes() == b"old"


def test_only_its_owner_can_read_a_private_file(tmp_path):
    write_private_file(tmp_path / "file", b"data")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
