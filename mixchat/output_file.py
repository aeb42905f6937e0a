"""Files that a person names for our output: a mistyped name must not cost somebody a file.

One rule for every flag. A file that is there is only replaced where the same flag wrote it, which
its first bytes say, or where it is empty. A link that a person names is followed: what it leads to
counts. A pipe, or a device such as /dev/null or /dev/stdout, is written to where a stream will do.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mixchat.errors import MixchatError, ResourceError, UsageError
from mixchat.files import DISK_FULL, open_regular

_HEAD = 4096  # bytes of a file that say who wrote it


def _never(head: bytes) -> bool:
    """Nothing is replaced: a person may have edited it."""
    return False


@dataclass(frozen=True)
class OutputFile:
    """A place that `flag` names. `ours` tells by a file's first bytes whether the flag wrote it.

    `streams`: a pipe or a device will do, too; else the file is replaced as a whole. Raises
    `UsageError`, with what to do instead, where the place cannot be used.
    """

    flag: str
    path: Path
    ours: Callable[[bytes], bool] = _never
    streams: bool = True

    def check(self) -> OutputFile:
        """See, before anything is computed, that it can be written to later."""
        try:
            mode = self._mode()
            if mode is not None and not self._may_be_replaced(mode):
                raise self._taken()
            if mode is None or not self.streams:
                self._check_directory()
        except OSError as error:
            raise UsageError(f"{self}: cannot be read ({error.strerror})") from None
        return self

    def write(self, data: bytes) -> None:
        """Write all of it; half of it is removed. Raises `ResourceError` where the disk is full."""
        with self.open() as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError as error:
                if regular:
                    with suppress(OSError):
                        self.place.unlink()
                raise self.not_written(error) from None

    def open(self) -> BinaryIO:
        """The file, empty and open for writing, without a buffer. Raises as `write` does."""
        self.check()
        try:
            return open(self._descriptor(), "wb", buffering=0)
        except OSError as error:
            raise self.not_written(error) from None

    def not_written(self, error: OSError) -> MixchatError:
        """The error for a person where the system refuses to write."""
        kind = ResourceError if error.errno in DISK_FULL else UsageError
        return kind(f"{self}: cannot be written ({error.strerror})")

    @property
    def place(self) -> Path:
        """The file that is meant: where a link leads to."""
        return Path(os.path.realpath(self.path))

    def __str__(self) -> str:
        return f"{self.flag} {self.path}"

    def _mode(self) -> int | None:
        """Return what is there, a link followed; None for nothing."""
        try:
            return os.stat(self.path).st_mode
        except FileNotFoundError:
            return None

    def _check_directory(self) -> None:
        directory = self.place.parent
        if not directory.is_dir():
            raise UsageError(f"{self}: there is no directory {directory}")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise UsageError(f"{self}: {directory} cannot be written to")

    def _may_be_replaced(self, mode: int) -> bool:
        if not stat.S_ISREG(mode):
            return self.streams and (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode))
        with open(open_regular(self.path), "rb") as file:
            return self._is_ours(file.read(_HEAD))

    def _is_ours(self, head: bytes) -> bool:
        return not head or self.ours(head)

    def _taken(self) -> UsageError:
        if self.ours is _never:
            hint = "Give a file that is not there yet."
            return UsageError(f"{self}: the file is there already", hint=hint)
        return UsageError(
            f"{self}: this is something else, which is left as it is",
            hint=f"Give a file that is not there yet, or one that {self.flag} wrote.",
        )

    def _descriptor(self) -> int:
        mode = self._mode()
        if mode is not None and not stat.S_ISREG(mode):
            return os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)  # waits for a FIFO's reader
        new = os.O_CREAT | os.O_EXCL if mode is None else 0  # made by somebody else meanwhile
        descriptor = open_regular(self.place, os.O_RDWR | new, follow=False)
        try:
            if not self._is_ours(os.pread(descriptor, _HEAD, 0)):
                raise self._taken()
            os.ftruncate(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor
