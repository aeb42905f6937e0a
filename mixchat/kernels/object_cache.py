"""Machine code that was made before, in files: compiling it takes half a second of every start."""

from __future__ import annotations

import contextlib
import errno
import grp
import hashlib
import os
import pwd
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import llvmlite

from mixchat.files import write_private_file
from mixchat.settings import data_dir

_DIGEST = hashlib.sha256().digest_size
_MOST_FILES = 64  # files: those of some versions and models
_ABANDONED = 3600  # seconds after which nobody writes a file any more
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_LINKS_REFUSED = os.O_NOFOLLOW | os.O_CLOEXEC


class ObjectCache:
    """The machine code of one module, for one CPU and one compiler.

    A file is a SHA-256 and what it is of. Whoever can write it, its directory or one above that can
    run code as whoever reads it: where that is anybody but its owner and root, the cache is not
    used, and the code is compiled anew at each start.
    """

    def __init__(self, source: str, target: str, directory: Path | None = None) -> None:
        """`source`: the module's text; `target`: all else that the code depends on."""
        known = "\0".join((source, target, llvmlite.__version__))
        self._directory = data_dir() / "kernels" if directory is None else directory
        self._name = f"{hashlib.sha256(known.encode()).hexdigest()}.o"

    def load(self) -> bytes | None:
        """The code, if it is there and whole, and nobody else can have written it."""
        try:
            with _trusted_directory(self._directory) as place:
                content = _read_trusted(self._name, place)
        except OSError:
            return None
        digest, code = content[:_DIGEST], content[_DIGEST:]
        return code if hashlib.sha256(code).digest() == digest else None

    def save(self, code: bytes) -> None:
        """Keep the code, where that is possible; of too many files the oldest go."""
        with contextlib.suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _trusted_directory(self._directory):
                content = hashlib.sha256(code).digest() + code
                write_private_file(self._directory / self._name, content)
                self._sweep()

    def _sweep(self) -> None:
        files = sorted(self._directory.glob("*.o"), key=lambda path: path.lstat().st_mtime)
        old = time.time() - _ABANDONED
        left = [path for path in self._directory.glob("*.tmp") if path.lstat().st_mtime < old]
        for path in [*files[:-_MOST_FILES], *left]:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _trusted_directory(directory: Path) -> Iterator[int]:
    """The directory, open; `PermissionError` where it, or one above, may be another user's to
    change. A link in its own place is not followed; of those above it what they lead to counts."""
    above = directory.parent.resolve(strict=True)
    place = os.open(above / directory.name, os.O_RDONLY | os.O_DIRECTORY | _LINKS_REFUSED)
    try:
        for path in (above, *above.parents):
            _check_trusted(os.stat(path), above=True)
        _check_trusted(os.fstat(place))
        yield place
    finally:
        os.close(place)


def _read_trusted(name: str, place: int) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _LINKS_REFUSED, dir_fd=place)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check_trusted(status)
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(errno.EPERM, "not a regular file")
        return file.read()


def _check_trusted(status: os.stat_result, *, above: bool = False) -> None:
    """Raise `PermissionError` where anybody but us and root can change it."""
    writable = status.st_mode & (_above_writable(status) if above else _OTHERS)
    if status.st_uid not in (os.geteuid(), 0) or writable:
        raise PermissionError(errno.EPERM, "others can write here")


def _above_writable(status: os.stat_result) -> int:
    """The bits that let others replace what is in a directory.

    In a sticky one, as /tmp is, others can make files but not replace ours; and where each user has
    a group of their own, many systems make all directories writable for it.
    """
    if status.st_mode & stat.S_ISVTX:
        return 0
    return stat.S_IWOTH if _is_own_group(status.st_gid) else _OTHERS


def _is_own_group(gid: int) -> bool:
    """Return whether a group is the user's own, which has their name and nobody else in it."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and not group.gr_mem
