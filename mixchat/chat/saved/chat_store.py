"""The saved chats in one SQLite database, found by ID, name or text."""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mixchat.base.errors import (
    ChatNotFoundError,
    CheckpointError,
    MissingDependencyError,
    MixchatError,
    ResourceError,
    UsageError,
)
from mixchat.base.files import TEMPORARY_SUFFIX, write_error
from mixchat.base.options import accepted_numbers
from mixchat.base.settings import data_dir
from mixchat.chat.saved.saved_chat import ID_PREFIX, LAST, ChatSummary, SavedChat, checked_name
from mixchat.text.messages import Message
from mixchat.text.tool_call import ToolCall

try:
    import sqlite3
except ImportError:
    raise MissingDependencyError("this Python was built without sqlite3") from None

_FORMAT = 1  # the database's user_version
# Times are in ISO 8601, UTC. `sampling` and `messages` are JSON. `question` begins the first one.
_TABLE = """CREATE TABLE chats (
    id TEXT PRIMARY KEY, name TEXT UNIQUE, model TEXT, identity TEXT, created TEXT, updated TEXT,
    turns INTEGER, question TEXT, revision INTEGER, sampling TEXT, system TEXT, messages TEXT)"""
_SUMMARY = "id, name, model, turns, question, created, updated"
_NEWEST_FIRST = "ORDER BY updated DESC, id DESC"
_ID = re.compile(r"[0-9]{8}-[0-9]{4}-[a-z0-9]{3}")
_CACHE = re.compile(rf"{_ID.pattern}\.kv(\..+{re.escape(TEMPORARY_SUFFIX)})?")
_ID_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"  # without those that look alike
_LOCK_TIMEOUT_S = 5.0  # for other sessions to save, which takes milliseconds
_MIN_LEFTOVER_AGE_S = 3600  # no process still writes an older file
_LIST_HINT = "'mixchat chats', or /chats in a chat, lists them."
_HOME_HINT = "Set MIXCHAT_HOME to a directory that is yours."
_START_HINT = "'mixchat run' starts one, and saves it."
_MAX_QUESTION = 200  # characters
_BEFORE_TEXT = 30  # characters of a passage before the text that was searched


class ChatStore:
    """The chats in a directory's database, which is created when the first one is saved.

    Several processes may save at once, and no turn is lost (see `save`). A chat's KV cache is a
    file next to the database, at `kv_path`. Methods raise `CheckpointError` for a database that is
    damaged or of another version, `ResourceError` for a full disk, and `UsageError` if the files
    cannot be used. The database then stays as it is.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = data_dir() / "chats" if directory is None else directory
        self.path = self.directory / "chats.db"

    def save(self, chat: SavedChat, name: str | None = None) -> SavedChat:
        """Save a chat, under a new name if one is given, and return it as it was saved.

        If another session has saved the chat since its revision, that one stays, and this one gets
        a new ID, and loses its old name. Raises `UsageError` if another chat has the new name.
        """
        with self._database("the chat cannot be saved", write=True) as database:
            if name is None:
                return _save(database, chat)
            name = checked_name(name)
            if other := _other_of_name(database, name, chat.id):
                hint = f"Choose another name, or remove that chat: mixchat chats --rm {other}"
                raise UsageError(f"the chat {other} already has the name {name!r}", hint=hint)
            return _save(database, replace(chat, name=name))

    def load(self, wanted: str) -> SavedChat:
        """Return the chat of this ID or name, of a unique prefix of its ID, or the last chat.

        Raises `ChatNotFoundError` if there is none, or more than one.
        """
        with self._database() as database:
            return _load(database, _find(database, wanted.strip()))

    def all(self, text: str = "") -> list[ChatSummary]:
        """Return a summary of every chat with a turn. The one that was saved last comes first.

        With a text, return only the chats that have it in their name, system prompt or messages, in
        capitals or not. In place of the question is the passage that has it. A chat of which every
        turn was undone is found by its ID or name alone.
        """
        pattern = re.compile(re.escape(text), re.IGNORECASE)
        selected = f"SELECT {_SUMMARY} FROM chats WHERE turns {_NEWEST_FIRST}"
        with self._database() as database:
            chats = [
                ChatSummary(*row[:5], *map(datetime.fromisoformat, row[5:]))
                for row in database.execute(selected)
            ]
            if not text:
                return chats
            passages = [_passage(_load(database, chat.id), pattern) for chat in chats]
        matches = zip(chats, passages, strict=True)
        return [replace(chat, question=passage) for chat, passage in matches if passage is not None]

    def remove(self, wanted: str) -> str:
        """Remove the chat that `wanted` means, and its KV cache. Returns its ID.

        Raises `ChatNotFoundError` as `load` does.
        """
        with self._database("the chat cannot be removed", write=True) as database:
            id = _find(database, wanted.strip())
            # The cache goes first. Without its chat, nobody would find it.
            self.kv_path(id).unlink(missing_ok=True)
            database.execute("DELETE FROM chats WHERE id = ?", [id])
        return id

    def kv_path(self, id: str) -> Path:
        """Return the place for a chat's KV cache."""
        assert _ID.fullmatch(id), "an ID names no file outside the directory"
        return self.directory / f"{id}.kv"

    def sweep(self) -> Iterator[tuple[Path, int]]:
        """Remove KV caches without a chat or that were never whole, and yield each with its bytes.

        They have to be an hour old, because a process may be writing newer ones. Raises `OSError`.
        """
        needed = {f"{chat.id}.kv" for chat in self.all()}
        for path in sorted(self.directory.glob("*.kv*")):
            status = path.lstat()
            is_old = time.time() - status.st_mtime > _MIN_LEFTOVER_AGE_S
            if is_old and _CACHE.fullmatch(path.name) and path.name not in needed:
                path.unlink()
                yield path, status.st_size

    @contextmanager
    def _database(
        self, fault: str = "the chats cannot be read", *, write: bool = False
    ) -> Iterator[sqlite3.Connection]:
        """Yield the database in a transaction, which an error undoes."""
        try:
            with closing(self._connected(write)) as database, database:
                database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                self._check_format(database)
                yield database
        except (sqlite3.Error, AttributeError, ValueError, TypeError, RecursionError) as error:
            raise self._explained(str(error), fault) from None
        except PermissionError as error:
            message = f"{self.path}: {fault}: {error.strerror}"
            raise UsageError(message, hint=_HOME_HINT) from None
        except OSError as error:
            raise write_error(error, self.path, fault) from None

    def _connected(self, write: bool) -> sqlite3.Connection:
        if write:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        # SQLite cannot create its own files in a directory that cannot be written.
        mode = "rw" if write or os.access(self.directory, os.W_OK) else "ro&immutable=1"
        name = f"{self.path.absolute().as_uri()}?mode={mode}"
        try:
            # To open and close the file here would end SQLite's locks of this process.
            if not stat.S_ISREG(self.path.lstat().st_mode):
                raise OSError(errno.EEXIST, "is not a regular file")
        except FileNotFoundError:
            name = ":memory:"  # there are no chats yet
        database = sqlite3.connect(name, uri=True, timeout=_LOCK_TIMEOUT_S, isolation_level=None)
        # Texts may have lone surrogates, which UTF-8 lacks.
        database.text_factory = lambda stored: stored.decode("utf-8", "surrogatepass")
        if write:
            with suppress(sqlite3.OperationalError):  # another session is doing it
                database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")  # a power cut loses nothing
        return database

    def _check_format(self, database: sqlite3.Connection) -> None:
        """Create the table of a new database. Raises `CheckpointError` for another format."""
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0 and not database.execute("SELECT 1 FROM sqlite_master").fetchone():
            database.execute(_TABLE)
            database.execute(f"PRAGMA user_version = {_FORMAT}")
        elif version != _FORMAT:
            raise CheckpointError(
                f"{self.path} was written by another version of mixchat "
                f"(format {version}, not {_FORMAT})",
                hint="Use that version, or set MIXCHAT_HOME to another place.",
            )

    def _explained(self, reason: str, fault: str) -> MixchatError:
        """Return the error that explains SQLite's message."""
        message = f"{self.path}: {fault} ({reason})"
        if "locked" in reason:
            hint = "Another session is saving. If one is suspended, continue or end it."
            return ResourceError(message, hint=hint)
        if "full" in reason or "I/O" in reason:
            return ResourceError(message)
        if "readonly" in reason or "unable to open" in reason:
            return UsageError(message, hint=_HOME_HINT)
        hint = "Move it away to start anew. 'sqlite3 FILE .recover' reads what is left of it."
        return CheckpointError(f"{self.path} is damaged ({reason})", hint=hint)


def new_id(started: datetime) -> str:
    """Return a new ID, made of the chat's start in local time and 3 random characters."""
    stamp = re.sub("[-:]", "", started.astimezone().isoformat()[:16]).replace("T", "-")
    return f"{stamp}-{''.join(secrets.choice(_ID_LETTERS) for _ in range(3))}"


def _save(database: sqlite3.Connection, chat: SavedChat) -> SavedChat:
    revisions = "SELECT revision FROM chats WHERE id = ?"
    while (row := database.execute(revisions, [chat.id]).fetchone()) and row != (chat.revision,):
        chat = replace(chat, id=new_id(chat.created), revision=0)
    if chat.name is not None and _other_of_name(database, chat.name, chat.id):
        chat = replace(chat, name=None)
    chat = replace(chat, revision=chat.revision + 1)
    questions = [message.content for message in chat.messages if message.role == "user"]
    messages = [
        {
            name: [astuple(call) for call in value] if name == "calls" else value
            for name, value in vars(message).items()
            if value != getattr(Message, name, 0)
        }
        for message in chat.messages
    ]
    row = vars(chat) | {
        "created": chat.created.isoformat(timespec="microseconds"),
        "updated": chat.updated.isoformat(timespec="microseconds"),
        "sampling": json.dumps(chat.sampling),
        "messages": json.dumps(messages, ensure_ascii=False),
        "turns": len(questions),
        "question": _line(questions[0]) if questions else "",
    }
    values = [v.encode("utf-8", "surrogatepass") if isinstance(v, str) else v for v in row.values()]
    places = ", ".join(["CAST(? AS TEXT)"] * len(row))  # bytes become text, and digits numbers
    database.execute(f"REPLACE INTO chats ({', '.join(row)}) VALUES ({places})", values)
    return chat


def _load(database: sqlite3.Connection, id: str) -> SavedChat:
    """Return a chat. Raises `ValueError` and `TypeError` if it is damaged."""
    names = [each.name for each in fields(SavedChat)]
    selected = f"SELECT {', '.join(names)} FROM chats WHERE id = ?"
    row = dict(zip(names, database.execute(selected, [id]).fetchone(), strict=True))
    for name in ("created", "updated"):
        row[name] = datetime.fromisoformat(row[name])
    row["sampling"] = accepted_numbers(json.loads(row["sampling"]))
    row["messages"] = tuple(map(_message, json.loads(row["messages"])))
    return SavedChat(**row)


def _message(raw: dict[str, Any]) -> Message:
    ids = raw.pop("ids", None)
    calls = tuple(ToolCall(*map(str, call)) for call in raw.pop("calls", ()))
    return Message(**raw, ids=None if ids is None else tuple(map(int, ids)), calls=calls)


def _other_of_name(database: sqlite3.Connection, name: str, id: str) -> str | None:
    """Return the ID of another chat with a name, if any."""
    named = "SELECT id FROM chats WHERE name = ? AND id != ?"
    return next((str(id) for (id,) in database.execute(named, [name, id])), None)


def _find(database: sqlite3.Connection, wanted: str) -> str:
    """Return the ID that is meant. Raises `ChatNotFoundError`."""
    rows = database.execute(f"SELECT id, name, turns FROM chats {_NEWEST_FIRST}").fetchall()
    if wanted == LAST:
        ids = [id for id, _, turns in rows if turns][:1]
    elif ID_PREFIX.fullmatch(wanted.lower()):
        ids = sorted(id for id, *_ in rows if id.startswith(wanted.lower()))
    else:
        ids = [id for id, name, _ in rows if name == wanted]
    if len(ids) == 1:
        return str(ids[0])
    if ids:
        hint = f"Give more of the ID. {_LIST_HINT}"
        message = f"{wanted!r} means {len(ids)} chats: {', '.join(ids[:5])}"
        raise ChatNotFoundError(f"{message}{'...' if len(ids) > 5 else ''}", hint=hint)
    if wanted == LAST:
        raise ChatNotFoundError("there are no saved chats yet", hint=_START_HINT)
    hint = _LIST_HINT if rows else f"There are no saved chats yet. {_START_HINT}"
    if near := difflib.get_close_matches(
        wanted, [word for row in rows for word in row[:2] if word]
    ):
        hint = f"Did you mean {', '.join(near)}? {_LIST_HINT}"
    raise ChatNotFoundError(f"there is no saved chat {wanted!r}", hint=hint)


def _passage(chat: SavedChat, pattern: re.Pattern[str]) -> str | None:
    """Return what the first match of a pattern in a chat stands in, on one line."""
    texts = (chat.name, chat.system, *(message.content for message in chat.messages))
    for text in texts:
        if match := pattern.search(text or ""):
            return _line((text or "")[max(0, match.start() - _BEFORE_TEXT) :])
    return None


def _line(text: str) -> str:
    """Return the beginning of a text on one line."""
    return " ".join(text[: 5 * _MAX_QUESTION].split())[:_MAX_QUESTION]
