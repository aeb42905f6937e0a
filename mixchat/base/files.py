"""Reads mixchat's own files with clear errors, and writes them whole or not at all.

Reading refuses a link (`follow=False`), writing replaces it. Anything that is neither a regular
file nor a link is not touched.
"""

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

from mixchat.base import system
from mixchat.base.errors import (
    CheckpointError,
    MixchatError,
    ResourceError,
    UsageError,
    short_message,
)
from mixchat.base.quantities import format_size

TEMPORARY_SUFFIX = ".mixchat.tmp"  # of a file until it is whole, which no other program writes
MAX_SIZE = 100_000_000  # bytes, of small files of checkpoints
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Permissions are missing, or another file or directory is in the way.
NOT_WRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,  # a link in place of a file of ours
)


def write_error(
    error: OSError, path: object, fault: str, default: type[MixchatError] = MixchatError
) -> MixchatError:
    """Return the error for a file that cannot be written, a `default` if no class is narrower."""
    narrower = ResourceError if error.errno in DISK_FULL else UsageError
    known = error.errno in (*DISK_FULL, *NOT_WRITABLE)
    return (narrower if known else default)(f"{path}: {fault} ({error.strerror})")


def local_error(
    error: OSError, work: object, variable: str = "MIXCHAT_HOME"
) -> MixchatError | None:
    """Return the error for a full disk or a directory that cannot be written, or None.

    variable: the environment variable that names the directory.
    """
    if error.errno in DISK_FULL:
        return ResourceError(
            f"the disk is full ({work})",
            hint=f"Free some space, or set {variable} to a directory on a larger disk. What is "
            "done stays. The same command resumes there.",
        )
    if error.errno in NOT_WRITABLE:
        return UsageError(
            f"cannot write {error.filename or variable}: {error.strerror}",
            hint=f"Set {variable} to a directory that can be written.",
        )
    return None


def open_regular(
    path: Path, flags: int = os.O_RDONLY, mode: int = 0o666, *, follow: bool = True
) -> int:
    """Open a regular file and return its descriptor. Without `follow`, a link is refused.

    A FIFO could wait forever for its other end. Raises `OSError`, whose `strerror` names what is
    there.
    """
    # huggingface_hub's cache consists of links. mixchat's own files are none.
    if not follow and path.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link", str(path))
    # A checkpoint whose config.json was a FIFO hung for ever, and /dev/zero filled the memory.
    flags |= os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = system.open_file(path, flags, mode)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a FIFO that nobody reads
            raise _not_regular(path) from None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise _not_regular(path)


def _not_regular(path: Path) -> OSError:
    if path.is_dir():
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return FileExistsError(errno.EEXIST, "is not a regular file", str(path))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a failure to read the file into `CheckpointError`."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def read_bytes(path: Path, *, follow: bool = True, max_bytes: int = MAX_SIZE) -> bytes:
    """Return the bytes of a regular file, at most `max_bytes`. Raises `CheckpointError`.

    mixchat's own files are read without `follow`, so that nobody's link decides which file is read.
    """
    with reading(path), open(open_regular(path, follow=follow), "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        limit = f"{format_size(max_bytes)}, the most that mixchat reads here"
        raise CheckpointError(f"{path}: larger than {limit}")
    return data


def require_regular(path: Path) -> None:
    """Raise `CheckpointError` unless there is a regular file."""
    with reading(path):
        os.close(open_regular(path))


def read_json_object(
    path: Path, *, follow: bool = True, max_bytes: int = MAX_SIZE
) -> dict[str, Any]:
    """Return the object in a JSON file of at most `max_bytes`. Raises `CheckpointError`."""
    return json_object(read_bytes(path, follow=follow, max_bytes=max_bytes), str(path))


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """Return an object in JSON. Raises `CheckpointError`, which names the file."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not JSON ({short_message(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: not a JSON object")
    return value


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, for one process at a time. Raises `OSError`."""
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)
    with removed_on_error(temporary):
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            # Without it, a power cut after the rename can leave an empty file under the new name.
            os.fsync(file.fileno())
        _check_replaceable(path)
        rename_durably(temporary, path)


def write_private_file(path: Path, data: bytes) -> None:
    """Write a private file, safe for several processes. Raises `OSError`."""
    with open_private_file(path) as descriptor:
        write_all(descriptor, data)


def read_all(descriptor: int, start: int, target: memoryview) -> int:
    """Fill `target` from offset `start` on, and return how many bytes were there."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], start + done)
        if not count:
            break
        done += count
    return done


def read_piece(descriptor: int, start: int, size: int) -> bytearray:
    """Return up to `size` bytes from offset `start` on."""
    piece = bytearray(size)
    del piece[read_all(descriptor, start, memoryview(piece)) :]
    return piece


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining) :]


@contextmanager
def open_private_file(path: Path) -> Iterator[int]:
    """Open a new file that only its owner can read, and rename it to `path` at the end."""
    _check_replaceable(path)
    descriptor, name = tempfile.mkstemp(TEMPORARY_SUFFIX, f"{path.name[:40]}.", path.parent)
    with removed_on_error(Path(name)):
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _check_replaceable(path)
        rename_durably(Path(name), path)


@contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Remove a file if the block fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def _check_replaceable(path: Path) -> None:
    # As root, a device was replaced by a file of ours.
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise _not_regular(path)


def temporary_path(path: Path) -> Path:
    """Return the name of a file until it is whole."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def rename_durably(temporary: Path, path: Path) -> None:
    """Rename a file that is synced, and sync the directory."""
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names of a directory's files durable."""
    # A rename is durable once the directory is synced, not the file.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
