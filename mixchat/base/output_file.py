"""Files that a person names for output. A mistyped name must not overwrite another file.

An existing file is replaced only if it is empty or the same flag wrote it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mixchat.base.errors import UsageError
from mixchat.base.files import open_regular, read_piece, write_error

_HEAD_BYTES = 4096  # which show the flag that wrote a file


def _never(head: bytes) -> bool:
    """Return False, since a person may have edited the file."""
    return False


@dataclass(frozen=True)
class OutputFile:
    """An output file that `flag` names. `ours` tells by its first bytes if the flag wrote it.

    With `streams` a pipe or a device can be used. Raises `UsageError`.
    """

    flag: str
    path: Path
    ours: Callable[[bytes], bool] = _never
    streams: bool = True

    def check(self) -> OutputFile:
        """Check, before anything is computed, that the file can be written."""
        try:
            mode = self._mode()
            if mode is not None and stat.S_ISREG(mode):
                with open(open_regular(self.path), "rb") as file:
                    replaceable = self._is_ours(file.read(_HEAD_BYTES))
            else:
                replaceable = mode is None or (
                    self.streams and (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode))
                )
        except OSError as error:
            raise UsageError(f"{self}: cannot be read ({error.strerror})") from None
        if not replaceable:
            raise self._taken()
        directory = self.place.parent
        if mode is not None and self.streams:
            return self
        if not directory.is_dir():
            raise UsageError(f"{self}: there is no directory {directory}")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise UsageError(f"{self}: {directory} cannot be written to")
        return self

    def write(self, data: bytes) -> None:
        """Write all of `data`, or leave no file. Raises `ResourceError` or `UsageError`."""
        with self.open() as file:
            self.write_first(file, data)

    def write_first(self, file: BinaryIO, data: bytes) -> None:
        """Write all of `data` to the opened file, or leave no file."""
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            if regular:
                with suppress(OSError):
                    self.place.unlink()
            raise write_error(error, self, "cannot be written", UsageError) from None

    def open(self) -> BinaryIO:
        """Return the file, empty and open for writing, without a buffer."""
        self.check()
        try:
            return open(self._descriptor(), "wb", buffering=0)
        except OSError as error:
            raise write_error(error, self, "cannot be written", UsageError) from None

    @property
    def place(self) -> Path:
        return Path(os.path.realpath(self.path))

    def __str__(self) -> str:
        return f"{self.flag} {self.path}"

    def _mode(self) -> int | None:
        try:
            return os.stat(self.path).st_mode
        except FileNotFoundError:
            return None

    def _is_ours(self, head: bytes) -> bool:
        return not head or self.ours(head)

    def _taken(self) -> UsageError:
        if self.ours is _never:
            hint = "Give a file that does not exist yet."
            return UsageError(f"{self}: the file exists already", hint=hint)
        return UsageError(
            f"{self}: exists, and was not written by {self.flag}",
            hint=f"Give a file that does not exist yet, or one that {self.flag} wrote.",
        )

    def _descriptor(self) -> int:
        mode = self._mode()
        if mode is not None and not stat.S_ISREG(mode):
            # This waits for a FIFO's reader.
            return os.open(self.path, os.O_WRONLY)
        new = os.O_CREAT | os.O_EXCL if mode is None else 0  # not what another process creates now
        descriptor = open_regular(self.place, os.O_RDWR | new, follow=False)
        try:
            if not self._is_ours(bytes(read_piece(descriptor, 0, _HEAD_BYTES))):
                raise self._taken()
            os.ftruncate(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor
