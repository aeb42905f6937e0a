"""The record of an unfinished model's finished tensors, so that none is made twice.

The first line of `journal.jsonl`, the head, says what is being made, and of what. Each further line
names tensors that are written and synced, with their SHA-256s. A line that a power cut has cut
short is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mixchat.base.files import open_regular, read_bytes, write_file
from mixchat.weights.format.manifest import Source

JOURNAL_FILE = "journal.jsonl"


class Journal:
    """The journal in `directory`; `made` maps a file to its tensors and their SHA-256s.

    A journal with another head is replaced by an empty one.
    """

    def __init__(self, directory: Path, head: dict[str, Any]) -> None:
        self._path, self._head = directory / JOURNAL_FILE, head
        self.made, whole = read_journal(directory, head)
        self._unsaved: list[tuple[str, dict[str, str]]] = []
        if whole:
            with self._opened() as journal:
                journal.truncate(whole)
        else:
            write_file(self._path, json.dumps(head).encode() + b"\n")

    def add(self, file: str, digests: dict[str, str]) -> None:
        """Note tensors of `file` that are written, though not yet durably."""
        self._unsaved.append((file, digests))

    def save(self) -> None:
        """Make the notes durable; the tensors themselves must be durable already."""
        with self._opened() as journal:
            journal.write(b"".join(_line(file, made) for file, made in self._unsaved))
            journal.flush()
            os.fsync(journal.fileno())
        for file, made in self._unsaved:
            self.made.setdefault(file, {}).update(made)
        self._unsaved.clear()

    def forget(self, lost: Mapping[str, Collection[str]]) -> None:
        """Remove these tensors of these files from the record, durably."""
        if not lost:
            return
        for file, tensors in lost.items():
            for tensor in tensors:
                del self.made[file][tensor]
        lines = [_line(file, made) for file, made in self.made.items()]
        write_file(self._path, b"".join([json.dumps(self._head).encode() + b"\n", *lines]))

    def _opened(self) -> BinaryIO:
        """Open the file to write at its end; a link in its place is refused."""
        return open(open_regular(self._path, os.O_WRONLY | os.O_APPEND, follow=False), "ab")


def _line(file: str, made: Mapping[str, str]) -> bytes:
    return json.dumps({"file": file, "sha256": made}).encode() + b"\n"


def read_journal(directory: Path, head: dict[str, Any]) -> tuple[dict[str, dict[str, str]], int]:
    """Return the finished tensors by file, and how many bytes of the journal are valid.

    With another head than `head`, no byte is.
    """
    if read_head(directory) != head:
        return {}, 0
    made: dict[str, dict[str, str]] = {}
    whole = 0
    lines = read_bytes(directory / JOURNAL_FILE, follow=False).splitlines(keepends=True)
    for number, line in enumerate(lines):
        try:
            record: Any = json.loads(line) if line.endswith(b"\n") else None
            if number:
                made.setdefault(record["file"], {}).update(record["sha256"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            break
        whole += len(line)
    return made, whole


def read_head(directory: Path) -> dict[str, Any] | None:
    """Return the head of a directory's journal; None where there is none that can be read."""
    try:
        with open(open_regular(directory / JOURNAL_FILE, follow=False), "rb") as journal:
            line = journal.readline(1 << 20)
        head = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError, RecursionError):
        return None
    return head if isinstance(head, dict) else None


def unfinished_source(directory: Path) -> Source | None:
    """Return the source of the unfinished model in a directory; None where it is not recorded."""
    head = read_head(directory) or {}
    try:
        source = Source(**head["source"])
    except (KeyError, TypeError):
        return None
    texts = (source.repo, source.commit or "", source.revision or "")
    return source if all(isinstance(text, str) for text in texts) else None
