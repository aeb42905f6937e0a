"""The history of the prompt, in a file that only its owner can read."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from prompt_toolkit.history import History

from mixchat.base.files import open_regular, write_private_file
from mixchat.base.lock import exclusive_lock

_MAX_ENTRIES = 2000
_MAX_FILE_BYTES = 4_000_000  # pasted files are entries, too


class InputHistory(History):
    """Entries in the form of prompt-toolkit's `FileHistory`, in `path`, or in memory if it is None.

    It never raises. After an error with the file, described in `fault`, entries are in memory. A
    link, or anything but a regular file, is left as it is. Several chats can write to one file.

    A command is saved when it has worked. In this chat, one that failed is an entry, too. `whole`
    returns what a text on the screen stands for.
    """

    def __init__(self, path: Path | None, whole: Callable[[str], str] = str) -> None:
        super().__init__()
        self._whole = whole
        self.fault: str | None = None
        self._failed: set[str] = set()
        self._command: str | None = None  # that was entered last, and may not have ended
        self._path = path
        self._entries: list[str] = []
        self._stored = ""  # the last entry that was saved
        if path is not None:
            with self._faults_recorded(path):
                self._open(path)

    def load_history_strings(self) -> Iterator[str]:
        """Return the entries, the newest first."""
        return reversed(self._entries)

    def append_string(self, string: str) -> None:
        """Save an entry, unless it starts with a space or repeats the one before."""
        shown = string
        string = self._whole(string)
        self._command = string if string.startswith("/") else None
        if string.startswith(" ") or not string or string in self._entries[-1:]:
            return
        self._entries.append(string)
        super().append_string(shown)  # a key that recalls it finds a long paste folded

    def store_string(self, string: str) -> None:
        """Write an entry to the file. What may be a command waits for `command_ended`."""
        if self._command is not None:
            return
        string = self._whole(string)
        self._stored = string
        if self._path is not None:
            with self._faults_recorded(self._path), _alone(self._path):
                _append(self._path, _written(string))

    def command_ended(self, *, worked: bool) -> None:
        """Save the entry that may be a command, or note that it failed."""
        command = self._command
        self._command = None
        if command is not None and not worked:
            self._failed.add(command)
        elif command is not None:
            self._failed.discard(command)
            if command != self._stored:
                self.store_string(command)

    def suggested(self, typed: str) -> str:
        """Return the rest of the newest line that begins with `typed`, or nothing.

        A command that failed is not suggested.
        """
        for entry in reversed(self._entries) if typed.strip() else ():
            for line in () if entry in self._failed else reversed(entry.splitlines()):
                if line.startswith(typed):
                    return line[len(typed) :]
        return ""

    def _open(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._entries = _entries_in(_read(path)) if os.path.lexists(path) else []
        with _alone(path):
            _append(path, b"")  # makes the file, for its owner alone
            # Another chat may have written since, and lines that it adds must not be lost.
            data = _read(path)
            entries = _entries_in(data)
            self._entries = entries[-_MAX_ENTRIES:]
            if len(entries) > _MAX_ENTRIES or path.stat().st_size > len(data):
                write_private_file(path, b"".join(map(_written, self._entries)))

    @contextmanager
    def _faults_recorded(self, path: Path) -> Iterator[None]:
        """Continue in memory if the file cannot be used."""
        try:
            yield
        except UnicodeDecodeError:
            self.fault = f"{path} is not UTF-8: what you type is not saved there"
        except OSError as error:
            self.fault = f"{path}: {error.strerror or error}: what you type is not saved there"
        if self.fault:
            self._path = None


def _alone(path: Path) -> AbstractContextManager[None]:
    """Keep other chats from writing or replacing the file meanwhile."""
    return exclusive_lock(path, on_wait=lambda: None)


def _read(path: Path) -> bytes:
    """Return the end of the file, at most `_MAX_FILE_BYTES`."""
    fd = open_regular(path, follow=False)
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > _MAX_FILE_BYTES:
            file.seek(size - _MAX_FILE_BYTES // 2)
            file.readline(_MAX_FILE_BYTES)
        return file.read(_MAX_FILE_BYTES)


def _entries_in(data: bytes) -> list[str]:
    """Return the entries in a file, the oldest first. Raises `UnicodeDecodeError`."""
    entries: list[list[str]] = [[]]
    # Not splitlines(), which splits at U+2028 and its like, too.
    for line in data.decode("utf-8").split("\n"):
        if line.startswith("+"):
            entries[-1].append(line[1:])
        elif entries[-1]:
            entries.append([])
    return ["\n".join(lines) for lines in entries if lines]


def _written(entry: str) -> bytes:
    lines = "".join(f"+{line}\n" for line in entry.split("\n"))
    return f"\n# {datetime.datetime.now()}\n{lines}".encode("utf-8", "replace")


def _append(path: Path, data: bytes) -> None:
    """Append all of it or nothing, because a cut character would spoil the file. May create it."""
    fd = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600, follow=False)
    with open(fd, "ab", buffering=0) as file:
        # A backup or another program may have given it other rights.
        os.fchmod(fd, 0o600)
        size = os.fstat(fd).st_size
        try:
            if os.write(fd, data) < len(data):
                raise OSError("the disk is full")
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise
