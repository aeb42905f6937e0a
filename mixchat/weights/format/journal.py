"""The record of an unfinished model's finished tensors, so that none is made twice.

The first line of `journal.jsonl`, its head, describes the model and its source. Each further line
names tensors that are written and synced, with their SHA-256s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mixchat.base.errors import CheckpointError
from mixchat.base.files import open_regular, read_bytes, write_file
from mixchat.weights.format.manifest import Source

JOURNAL_FILE = "journal.jsonl"


class Journal:
    """The journal of a workspace, read once. `head` is None if no journal can be read.

    `made` maps a file to its finished tensors and their SHA-256s.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / JOURNAL_FILE
        self.head: dict[str, Any] | None = None
        self.made: dict[str, dict[str, str]] = {}
        self._whole = 0  # bytes of whole lines
        self._unsaved: list[tuple[str, dict[str, str]]] = []
        try:
            lines = read_bytes(self._path, follow=False).splitlines(keepends=True)
        except CheckpointError:
            return
        # A power cut can leave half a line, or zeros. All lines before that count.
        for line in lines:
            try:
                record: Any = json.loads(line) if line.endswith(b"\n") else None
                if self._whole:
                    self.made.setdefault(record["file"], {}).update(record["sha256"])
                elif isinstance(record, dict):
                    self.head = record
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                return
            if self.head is None:
                return
            self._whole += len(line)

    @property
    def source(self) -> Source | None:
        """Return the source of the unfinished model, or None."""
        try:
            source = Source(**(self.head or {})["source"])
            texts = [text for text in (source.commit, source.revision) if text is not None]
            # This raises for values that are no text, and for half of a surrogate pair, which JSON
            # can hold.
            "".join([source.repo, *texts]).encode()
        except (KeyError, TypeError, UnicodeEncodeError):
            return None
        return source

    def made_under(self, head: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Return `made` if the journal has this head, else nothing."""
        return self.made if self.head == head else {}

    def start(self, head: dict[str, Any]) -> None:
        """Prepare the file for further lines. Another head replaces it."""
        if self.head == head:
            with self._opened() as journal:  # lines after half a line would not be read
                journal.truncate(self._whole)
        else:
            self.head = head
            self.made = {}
            write_file(self._path, _line(head))

    def add(self, file: str, digests: dict[str, str]) -> None:
        """Note tensors of `file` that are written but not yet durable."""
        self._unsaved.append((file, digests))

    def save(self) -> None:
        """Make the notes durable. The tensors must be durable already."""
        with self._opened() as journal:
            journal.write(b"".join(_line_of(file, digests) for file, digests in self._unsaved))
            journal.flush()
            os.fsync(journal.fileno())
        for file, digests in self._unsaved:
            self.made.setdefault(file, {}).update(digests)
        self._unsaved.clear()

    def forget(self, lost: Mapping[str, Collection[str]]) -> None:
        """Remove these tensors from the record, durably."""
        for file, tensors in lost.items():
            for tensor in tensors:
                del self.made[file][tensor]
        if lost:
            lines = [_line_of(file, digests) for file, digests in self.made.items()]
            write_file(self._path, b"".join([_line(self.head), *lines]))

    def _opened(self) -> BinaryIO:
        return open(open_regular(self._path, os.O_WRONLY | os.O_APPEND, follow=False), "ab")


def _line(record: dict[str, Any] | None) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _line_of(file: str, digests: Mapping[str, str]) -> bytes:
    return _line({"file": file, "sha256": digests})
