"""Small files: read whole with one clear line for every fault, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mixchat.errors import CheckpointError, MixchatError, ResourceError, UsageError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# A place cannot be written to: for want of rights, or because something else is there.
NOT_WRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,  # a link where a file of ours belongs
)


def not_written(error: OSError, path: Path, what: str) -> MixchatError:
    """The error for a person where a file cannot be written, or removed: by whose doing it is."""
    kind = MixchatError
    if error.errno in DISK_FULL:
        kind = ResourceError
    elif error.errno in NOT_WRITABLE:
        kind = UsageError
    return kind(f"{path}: {what} ({error.strerror})")


def open_regular(path: Path, flags: int = os.O_RDONLY, *, follow: bool = True) -> int:
    """Open a regular file that is there; its descriptor. Without `follow`, a link is refused.

    Opening a FIFO would wait for its other end for ever, and a device may be anything. Raises
    `OSError`, whose `strerror` says what else is there.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a FIFO that nobody reads
            raise _not_regular(path) from None
        if error.errno == errno.ELOOP and path.is_symlink() and not follow:
            raise OSError(errno.ELOOP, "is a symbolic link", str(path)) from None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise _not_regular(path)


def _not_regular(path: Path) -> OSError:
    if path.is_dir():
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return FileExistsError(errno.EEXIST, "is not a regular file", str(path))


def read_bytes(path: Path, *, follow: bool = True) -> bytes:
    """The bytes of a regular file. Raises `CheckpointError` where it cannot be read.

    Files of our own are read without `follow`: nobody else's link says what we read.
    """
    try:
        with open(open_regular(path, follow=follow), "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` where there is none."""
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not JSON ({reason})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever happens meanwhile."""
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    give_name(temporary, path)


def write_private_file(path: Path, data: bytes) -> None:
    """`write_file` for what concerns its owner alone: nobody else can read it, at no moment."""
    with private_in_place_of(path) as descriptor:
        write_all(descriptor, data)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it, in as many pieces as the system takes."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


@contextmanager
def private_in_place_of(path: Path) -> Iterator[int]:
    """A new file, open for writing, that takes the name `path` at the end; only its owner reads it.

    Its own name is drawn, so that two processes with one `path` do not write into each other's.
    """
    descriptor, name = tempfile.mkstemp(".tmp", f"{path.name[:40]}.", path.parent)
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        give_name(Path(name), path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def temporary_name(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(path.name + ".tmp")


def give_name(temporary: Path, path: Path) -> None:
    """Rename a file that is whole and synced, and make the renaming durable."""
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make durable which files a directory has."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
