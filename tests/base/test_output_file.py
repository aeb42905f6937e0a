"""A file that a person names for output: another file is never replaced."""

import errno
import os
from pathlib import Path

import pytest

from mixchat.base import output_file
from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.output_file import OutputFile

OURS = b"ours: "


def output(path: Path, **options: bool) -> OutputFile:
    return OutputFile("--out", path, lambda head: head.startswith(OURS), **options)


def test_a_new_file_is_created_and_one_that_is_empty_or_that_the_flag_wrote_is_replaced(tmp_path):
    (tmp_path / "empty").touch()
    for name in ("new", "empty"):
        for data in (OURS + b"a long first text", OURS + b"short"):
            output(tmp_path / name).write(data)
            assert (tmp_path / name).read_bytes() == data


@pytest.mark.parametrize("streams", [True, False])
def test_a_file_that_the_flag_did_not_write_is_not_replaced(tmp_path, streams):
    (tmp_path / "f").write_bytes(b"notes")
    for use in (output(tmp_path / "f", streams=streams).check, output(tmp_path / "f").open):
        with pytest.raises(UsageError, match="exists, and was not written by --out") as caught:
            use()
        assert caught.value.hint == "Give a file that does not exist yet, or one that --out wrote."
    assert (tmp_path / "f").read_bytes() == b"notes"


def test_a_link_is_followed_also_to_a_missing_file(tmp_path):
    (tmp_path / "link").symlink_to("f")
    for _ in range(2):
        output(tmp_path / "link").write(OURS)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "f").read_bytes() == OURS
    (tmp_path / "f").write_bytes(b"notes")
    with pytest.raises(UsageError, match="was not written by --out"):
        output(tmp_path / "link").write(OURS)


def test_a_device_is_written_to_where_a_stream_is_enough():
    output(Path("/dev/null")).write(OURS)
    assert Path("/dev/null").is_char_device()
    with pytest.raises(UsageError, match="was not written by --out"):
        output(Path("/dev/null"), streams=False).check()


def test_a_pipe_receives_all_data(tmp_path):
    reader, writer = os.pipe()
    output(Path(f"/dev/fd/{writer}")).write(OURS)
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == OURS


def test_a_device_that_is_not_there_is_wrong_use(tmp_path, monkeypatch):
    """/dev/tty without a terminal counted as a fault of mixchat's."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENXIO, "No such device or address")

    monkeypatch.setattr(OutputFile, "_descriptor", refuse)
    with pytest.raises(UsageError, match="cannot be written"):
        OutputFile("--prompt-cache", tmp_path / "x").open()


@pytest.mark.parametrize(
    ("put", "error"),
    [
        (Path.mkdir, "was not written by --out"),
        (os.mkfifo, "was not written by --out"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
    ],
    ids=["directory", "pipe", "link in a circle"],
)
def test_what_is_no_file_is_refused(tmp_path, put, error):
    put(tmp_path / "f")
    with pytest.raises(UsageError, match=error):
        output(tmp_path / "f", streams=False).check()


def test_a_missing_directory_is_reported_beforehand(tmp_path):
    with pytest.raises(UsageError, match="there is no directory"):
        output(tmp_path / "typo" / "f").check()


def test_a_file_created_since_the_check_is_not_replaced(tmp_path, monkeypatch):
    named = output(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"notes")
    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "_mode", lambda self: None)
        with pytest.raises(UsageError, match="File exists"):
            named.write(OURS)
    assert (tmp_path / "f").read_bytes() == b"notes"


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_a_full_disk_has_its_own_error(monkeypatch):
    """A fault here removed the device of a machine whose tests ran as root."""
    removed = []
    monkeypatch.setattr(Path, "unlink", lambda self: removed.append(self))
    with pytest.raises(ResourceError, match="No space left"):
        output(Path("/dev/full")).write(OURS)
    assert removed == []


def test_a_partly_written_file_is_removed(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.fileno, self.closed = lambda: file, False

        def close(self):
            if not self.closed:
                os.close(self.fileno())
            self.closed = True

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.close()

    named = output(tmp_path / "f")
    monkeypatch.setattr(output_file, "open", lambda fd, *_, **__: Full(fd), raising=False)
    with pytest.raises(ResourceError, match=r"--out .*f: cannot be written \(No space left"):
        named.write(OURS)
    assert os.listdir(tmp_path) == []
