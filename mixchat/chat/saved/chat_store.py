"""The saved chats, each a private file, found by ID or name and written whole."""

from __future__ import annotations

import difflib
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from mixchat.base.errors import ChatNotFoundError, CheckpointError, ResourceError, UsageError
from mixchat.base.files import TEMPORARY_SUFFIX, sync_directory, write_error, write_private_file
from mixchat.base.lock import Busy, exclusive_lock
from mixchat.base.settings import data_dir
from mixchat.chat.saved.chat_file import (
    ID_PREFIX,
    LAST,
    SavedChat,
    checked_name,
    now,
    read_chat,
    read_name,
    serialized,
)

_ID = re.compile(r"[0-9]{8}-[0-9]{4}-[a-z0-9]{3}")
_CHAT = re.compile(rf"{_ID.pattern}\.json")
_LEFTOVER = re.compile(rf"{_ID.pattern}\.(kv|(kv|json)\..+{re.escape(TEMPORARY_SUFFIX)})")
_ID_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"  # without those that look alike
_LOCK_TIMEOUT_S = 5.0  # for other sessions to save, which takes milliseconds
_MIN_LEFTOVER_AGE_S = 3600  # no process still writes an older file
_LIST_HINT = "'mixchat chats', or /chats in a chat, lists them."
_START_HINT = "'mixchat run' starts one, and saves it."
_MAX_LISTED = 5  # chats, in a message
_MAX_QUESTION = 200  # characters


@dataclass(frozen=True)
class ChatSummary:
    """A saved chat in a line. `question` is the beginning of the first one, on one line.

    `problem` says why the chat cannot be read. Little else is known then, and `updated` is the
    file's own time.
    """

    id: str
    path: Path
    updated: datetime
    created: datetime | None = None
    name: str | None = None
    model: str = ""
    turns: int = 0
    question: str = ""
    problem: str | None = None


class ChatStore:
    """The chats in a directory, which is created when the first one is saved.

    A chat is one file, not a row of a database, so that a damaged file costs one chat. Several
    processes may save at once, and no turn is lost (see `save`). The KV cache of a chat is a file
    next to it, at `kv_path`.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = data_dir() / "chats" if directory is None else directory

    def new_id(self, started: datetime | None = None) -> str:
        """Return a new ID, made of the chat's start in local time and 3 random characters."""
        stamp = (started or now()).astimezone().strftime("%Y%m%d-%H%M")
        while True:
            id = f"{stamp}-{''.join(secrets.choice(_ID_LETTERS) for _ in range(3))}"
            if not self._path(id).exists():
                return id

    def save(self, chat: SavedChat, known: SavedChat | None = None) -> SavedChat:
        """Save a chat in place of `known`, which its file should hold. None stands for no file.

        If the file holds anything else, another session has changed it. Then it stays, and the chat
        is saved under a new ID. Returns the chat as it was saved. Raises `MixchatError`.
        """
        with self._locked(chat.id):
            return self._save(chat, known)

    def rename(self, chat: SavedChat, name: str) -> SavedChat:
        """Save a chat, which its file should hold, under a name. Returns it as it was saved.

        Raises `UsageError` if another chat has that name, and as `save` does.
        """
        name = checked_name(name)
        with self._locked(chat.id):
            taken = [id for id in self._named(name) if id != chat.id]
            if taken:
                hint = f"Choose another name, or remove that chat: mixchat chats --rm {taken[0]}"
                raise UsageError(f"the chat {taken[0]} already has the name {name!r}", hint=hint)
            return self._save(replace(chat, name=name), chat)

    def _save(self, chat: SavedChat, known: SavedChat | None) -> SavedChat:
        # Look and write under one lock. Without it, 11 of 60 times one of two processes that had
        # resumed the same chat lost its turn.
        path = self._path(chat.id)
        if os.path.lexists(path) and not _holds(path, known):
            name = None if known is not None and chat.name == known.name else chat.name
            chat = replace(chat, id=self.new_id(chat.created), name=name)
        write_private_file(self._path(chat.id), serialized(chat))
        return chat

    @contextmanager
    def _locked(self, id: str) -> Iterator[None]:
        """Create the directory, and keep other sessions from writing chats meanwhile.

        Raises `MixchatError` if nothing can be written, or if the other sessions do not end.
        """
        path, fault = self._path(id), "the chat cannot be saved"
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # One lock for all chats, because a rename looks for its name in all of them.
            with exclusive_lock(
                self.directory / "chats", on_wait=lambda: None, timeout=_LOCK_TIMEOUT_S
            ):
                yield
        except Busy:
            raise ResourceError(
                f"{path}: {fault} (another session is saving)",
                hint="If one is suspended, continue or end it.",
            ) from None
        except OSError as error:
            raise write_error(error, path, fault) from None

    def load(self, wanted: str) -> SavedChat:
        """Return the chat of this ID or name, of a unique prefix of its ID, or the last chat.

        Raises `ChatNotFoundError` if there is none, or more than one. Raises `CheckpointError` if
        it is damaged.
        """
        return self.latest() if wanted == LAST else read_chat(self._path(self.find(wanted)))

    def find(self, wanted: str) -> str:
        """Return the ID of the chat that `wanted` means, damaged or not.

        Raises `ChatNotFoundError` if there is none, or more than one.
        """
        wanted = wanted.strip()
        if ID_PREFIX.fullmatch(wanted.lower()):
            ids = [id for id in self.ids() if id.startswith(wanted.lower())]
        else:
            ids = self._named(wanted)
        if len(ids) == 1:
            return ids[0]
        if ids:
            hint = f"Give more of the ID. {_LIST_HINT}"
            raise ChatNotFoundError(f"{wanted!r} means {len(ids)} chats: {_some(ids)}", hint=hint)
        known = [word for chat in self.all() for word in (chat.id, chat.name) if word]
        hint = _LIST_HINT if known else f"There are no saved chats yet. {_START_HINT}"
        if near := difflib.get_close_matches(wanted, known):
            hint = f"Did you mean {_some(near)}? {_LIST_HINT}"
        raise ChatNotFoundError(f"there is no saved chat {wanted!r}", hint=hint)

    def latest(self) -> SavedChat:
        """Return the chat that was saved last and is not damaged.

        Raises `ChatNotFoundError` if there is none.
        """
        for summary in self.all():
            if summary.problem is None:
                return self.load(summary.id)
        raise ChatNotFoundError("there are no saved chats yet", hint=_START_HINT)

    def ids(self) -> list[str]:
        """Return the ID of every chat, damaged or not, the oldest first. Opens no file."""
        return [path.stem for path in self._files(_CHAT)]

    def names(self) -> list[str]:
        """Return the names of chats, the newest first. Reads only the beginnings of the files.

        Raises `OSError` if the directory cannot be read.
        """
        names = (read_name(self._path(id)) for id in reversed(self.ids()))
        return [name for name in names if name is not None]

    def all(self) -> list[ChatSummary]:
        """Return a summary of every chat with a turn, and of every damaged one.

        The one that was saved last comes first. A chat of which every turn was undone is found by
        its ID or name alone. Raises `OSError` if the directory cannot be read, as every search for
        a chat does.
        """
        summaries = [each for each in self._summaries() if each.turns or each.problem]
        return sorted(summaries, key=lambda summary: (summary.updated, summary.id), reverse=True)

    def remove(self, wanted: str) -> str:
        """Remove the chat that `wanted` means, damaged or not, and its KV cache. Returns its ID.

        Raises `ChatNotFoundError` as `find` does, and `MixchatError` if it cannot be removed.
        """
        id = self.find(wanted)
        path = self._path(id)
        try:
            # The cache goes first. Without its chat, nobody would find it.
            self.kv_path(id).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            sync_directory(self.directory)
        except OSError as error:
            raise write_error(error, path, "the chat cannot be removed") from None
        return id

    def kv_path(self, id: str) -> Path:
        """Return the place for a chat's KV cache. Raises `UsageError` for a wrong ID."""
        return self._path(id).with_suffix(".kv")

    def sweep(self) -> Iterator[tuple[Path, int]]:
        """Remove the leftovers of killed processes, and yield each path and its bytes.

        They are KV caches without a chat and files that were never whole, if they are an hour old.
        A process may be writing newer ones. Raises `OSError`.
        """
        for path in self._files(_LEFTOVER):
            needed = path.suffix == ".kv" and path.with_suffix(".json").exists()
            with suppress(FileNotFoundError):
                status = path.lstat()
                if not needed and time.time() - status.st_mtime > _MIN_LEFTOVER_AGE_S:
                    path.unlink()
                    yield path, status.st_size

    def _path(self, id: str) -> Path:
        """Return the file of a chat. An ID cannot name one outside the directory."""
        if not _ID.fullmatch(id):
            raise UsageError(f"{id!r} is not a chat's ID")
        return self.directory / f"{id}.json"

    def _files(self, names: re.Pattern[str]) -> list[Path]:
        """Return the files with such names. Raises `OSError` if the directory cannot be read."""
        try:
            paths = sorted(self.directory.iterdir())
        except FileNotFoundError:
            return []
        return [path for path in paths if names.fullmatch(path.name) and path.is_file()]

    def _named(self, name: str) -> list[str]:
        return [summary.id for summary in self._summaries() if summary.name == name]

    def _summaries(self) -> Iterator[ChatSummary]:
        for id in self.ids():
            path = self._path(id)
            try:
                changed = datetime.fromtimestamp(path.lstat().st_mtime, timezone.utc)
                chat = read_chat(path)
            except FileNotFoundError:  # it has just been removed
                continue
            except CheckpointError as error:
                yield ChatSummary(id, path, changed, problem=str(error))
                continue
            asked = [message.content for message in chat.messages if message.role == "user"]
            # A pasted book is not split into words to show its beginning.
            question = " ".join(asked[0][: 5 * _MAX_QUESTION].split()) if asked else ""
            question, turns = question[:_MAX_QUESTION], len(asked)
            yield ChatSummary(
                id, path, chat.updated, chat.created, chat.name, chat.model, turns, question
            )


def _holds(path: Path, chat: SavedChat | None) -> bool:
    """Return whether a file holds just this chat, and not a damaged one or a newer mixchat's."""
    try:
        return read_chat(path) == chat
    except CheckpointError:
        return False


def _some(words: Sequence[str]) -> str:
    """Return the first of the words, and how many more there are."""
    more = f" and {len(words) - _MAX_LISTED} more" if len(words) > _MAX_LISTED else ""
    return ", ".join(words[:_MAX_LISTED]) + more
