"""A cache of machine code in files, because compiling takes half a second at each start."""

from __future__ import annotations

import contextlib
import errno
import grp
import hashlib
import os
import pwd
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import llvmlite

from mixchat.base.files import TEMPORARY_SUFFIX, write_private_file
from mixchat.base.settings import data_dir

_DIGEST = hashlib.sha256().digest_size
_NAME = re.compile(r"[0-9a-f]{64}\.o")  # other files in the directory stay
_MOST_FILES = 64  # enough for some versions and models
_ABANDONED_S = 3600  # after which no process still writes a file
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class ObjectCache:
    """The machine code of one module, for one CPU and one compiler.

    A user who can write the file, its directory or one above can run code as the user who reads it.
    If any but the owner and root can do so, the cache is not used.
    """

    def __init__(self, source: str, target: str, directory: Path | None = None) -> None:
        """`source` tells the module's text, `target` all else that the code depends on."""
        key = "\0".join((source, target, llvmlite.__version__))
        self._directory = data_dir() / "kernels" if directory is None else directory
        self._name = f"{hashlib.sha256(key.encode()).hexdigest()}.o"

    def load(self) -> bytes | None:
        """Return the code if it is there, undamaged, and no other user can have written it."""
        try:
            with _trusted_directory(self._directory) as directory:
                content = _read_trusted(self._name, directory)
        except OSError:
            return None
        digest = content[:_DIGEST]
        code = content[_DIGEST:]
        return code if hashlib.sha256(code).digest() == digest else None

    def save(self, code: bytes) -> None:
        """Write the code if that is possible, and remove the oldest of too many files."""
        with contextlib.suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _trusted_directory(self._directory):
                content = hashlib.sha256(code).digest() + code
                write_private_file(self._directory / self._name, content)
                named = (path for path in self._directory.glob("*.o") if _NAME.fullmatch(path.name))
                files = sorted(named, key=lambda path: path.lstat().st_mtime)
                # A process that was killed leaves its temporary file.
                latest = time.time() - _ABANDONED_S
                temporary = self._directory.glob(f"*{TEMPORARY_SUFFIX}")
                abandoned = [path for path in temporary if path.lstat().st_mtime < latest]
                for path in [*files[:-_MOST_FILES], *abandoned]:
                    path.unlink(missing_ok=True)


@contextlib.contextmanager
def _trusted_directory(directory: Path) -> Iterator[int]:
    """Open the directory. Raises `PermissionError` if another user may change it or one above.

    If it is a link itself, it is not followed.
    """
    above = directory.parent.resolve(strict=True)
    descriptor = os.open(above / directory.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for path in (above, *above.parents):
            _check_trusted(os.stat(path), above=True)
        _check_trusted(os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def _read_trusted(name: str, directory: int) -> bytes:
    # O_NONBLOCK, because opening a FIFO would wait for a writer.
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=directory)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check_trusted(status)
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(errno.EPERM, "not a regular file")
        return file.read()


def _check_trusted(status: os.stat_result, *, above: bool = False) -> None:
    """Raise `PermissionError` if another user than this one and root can change it."""
    writable = status.st_mode & _WRITABLE_BY_OTHERS
    # In a sticky directory (/tmp) only a file's owner can replace it.
    if above and status.st_mode & stat.S_ISVTX:
        writable = 0
    # Debian and Fedora give each user a group of the same name, and its members may write.
    elif above and _is_own_group(status.st_gid):
        writable &= stat.S_IWOTH
    if status.st_uid not in (os.geteuid(), 0) or writable:
        raise PermissionError(errno.EPERM, "others can write here")


def _is_own_group(gid: int) -> bool:
    """Return whether a group has the user's name and no other member."""
    try:
        group = grp.getgrgid(gid)
        user = pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and not group.gr_mem
