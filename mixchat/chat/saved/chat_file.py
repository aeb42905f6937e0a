"""A saved chat, and its JSON file, which is read strictly, whatever bytes it has."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeAlias

from mixchat.base.errors import CheckpointError, UsageError, short_message
from mixchat.base.files import open_regular, read_bytes
from mixchat.base.sanitize import sanitize
from mixchat.text.messages import Message

_FORMAT = 1
MAX_NAME = 80  # characters
LAST = "last"  # in place of an ID, means the chat that was saved last
# The beginning of an ID. No name looks like one, so that no word means two chats.
ID_PREFIX = re.compile(r"[0-9]{1,8}|[0-9]{8}-[0-9]{0,4}|[0-9]{8}-[0-9]{4}-[a-z0-9]{0,3}")

_BEFORE_NAME = f'{{"format": {_FORMAT}, "name": '  # the beginning of a file
_MAX_HEAD = 1024  # bytes that hold this beginning and the name, of 4 bytes a character at most

_Number: TypeAlias = int | float | None


@dataclass(frozen=True)
class SavedChat:
    """A conversation, and everything that resuming it takes.

    `model` is its name as typed, `identity` the hash of its weights. `sampling` has the parameters
    by name. The system prompt is not among the messages.
    """

    id: str
    name: str | None
    model: str
    identity: str
    created: datetime
    updated: datetime
    system: str | None
    sampling: Mapping[str, _Number]
    messages: tuple[Message, ...]


def now() -> datetime:
    """Return the time, for `SavedChat.created` and `SavedChat.updated`."""
    return datetime.now(timezone.utc)


def checked_name(name: str) -> str:
    """Return a name without spaces around it. Raises `UsageError` if it cannot be a chat's."""
    name = name.strip()
    problem = None
    if not name:
        problem = "is empty"
    elif len(name) > MAX_NAME:
        problem = f"is longer than {MAX_NAME} characters"
    elif sanitize(name) != name or "\t" in name or len(name.splitlines()) > 1:
        problem = "is not one line of text"
    elif name == LAST:
        problem = f"means the last chat: {name!r}"
    elif ID_PREFIX.fullmatch(name.lower()):
        problem = f"looks like a chat's ID: {name!r}"
    elif name.startswith("-"):
        problem = f"looks like a flag: {name!r}"
    if problem:
        raise UsageError(f"the chat's name {problem}")
    return name


def as_json(chat: SavedChat) -> dict[str, Any]:
    """Return the chat as JSON has it, without its ID. Times are in UTC."""
    return {
        "name": chat.name,
        "model": chat.model,
        "identity": chat.identity,
        "created": chat.created.astimezone(timezone.utc).isoformat(),
        "updated": chat.updated.astimezone(timezone.utc).isoformat(),
        "system": chat.system,
        "sampling": dict(chat.sampling),
        "messages": [
            {
                field.name: value
                for field in fields(message)
                if (value := getattr(message, field.name)) != field.default
            }
            for message in chat.messages
        ],
    }


def serialized(chat: SavedChat) -> bytes:
    """Return the content of a chat's file. Raises `UsageError` if its name cannot be one."""
    name = None if chat.name is None else checked_name(chat.name)
    raw = {"format": _FORMAT, **as_json(chat), "name": name}
    # json.loads reads a lone surrogate, which UTF-8 does not have, as it was written.
    text = json.dumps(raw, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def read_chat(path: Path) -> SavedChat:
    """Return the chat in a file, whose name without `.json` is its ID.

    Raises `CheckpointError` if it cannot be read, is damaged, or is of another version.
    """
    data = read_bytes(path, follow=False)
    try:
        raw = json.loads(data)
        _check(isinstance(raw, dict), "it is not a JSON object")
        version = raw.get("format")
        # Not isinstance: for Python, true is an int.
        _check(type(version) is int, "it does not say its format")
        if version == _FORMAT:
            return _chat(path.stem, raw)
    # Python's parser recurses, and a file of 100,000 brackets is no chat.
    except (ValueError, RecursionError, UsageError) as error:
        hint = f"To remove it: mixchat chats --rm {path.stem}"
        raise CheckpointError(f"{path} is damaged ({short_message(error)})", hint=hint) from None
    raise CheckpointError(
        f"{path} was written by another version of mixchat (format {version}, not {_FORMAT})",
        hint="Read it with that version.",
    )


def read_name(path: Path) -> str | None:
    """Return the name of the chat in a file, or None. Reads only the beginning of the file.

    It serves the completion of names, which has no time to read whole chats.
    """
    try:
        with open(open_regular(path, follow=False), "rb") as file:
            head = file.read(_MAX_HEAD).decode(errors="ignore")
        name, _ = json.JSONDecoder().raw_decode(head.removeprefix(_BEFORE_NAME))
        return checked_name(name) if head.startswith(_BEFORE_NAME) and name else None
    except (OSError, ValueError, RecursionError, AttributeError, UsageError):
        return None


def _chat(id: str, raw: dict[str, Any]) -> SavedChat:
    """Return the chat. Raises `ValueError` if a key is missing or of another type."""
    known = {"format", *(field.name for field in fields(SavedChat))} - {"id"}
    _check(raw.keys() == known, f"its keys are not {', '.join(sorted(known))}")
    for key in ("model", "identity"):
        _check(isinstance(raw[key], str), f"its {key} is not text")
    for key in ("name", "system"):
        _check(raw[key] is None or isinstance(raw[key], str), f"its {key} is neither text nor null")
    name, sampling, messages = raw["name"], raw["sampling"], raw["messages"]
    _check(name is None or checked_name(name) == name, "its name has spaces around it")
    _check(isinstance(sampling, dict), "its sampling is not an object")
    for value in sampling.values():
        # A seed has 64 bits. Python's bool is an int, and JSON's numbers may be infinite.
        whole = type(value) is int and -(2**63) <= value < 2**64
        real = type(value) is float and math.isfinite(value)
        _check(value is None or whole or real, "its sampling has something else than numbers")
    _check(isinstance(messages, list), "its messages are not a list")
    return SavedChat(
        id,
        name,
        raw["model"],
        raw["identity"],
        _time(raw["created"]),
        _time(raw["updated"]),
        raw["system"],
        sampling,
        tuple(map(_message, messages)),
    )


def _time(text: object) -> datetime:
    _check(isinstance(text, str), "a time is not text")
    time = datetime.fromisoformat(str(text))
    _check(time.utcoffset() == timedelta(0), "a time is not in UTC")
    _check(1970 < time.year < 9999, "a time is out of range")  # so that it has a local time
    return time.astimezone(timezone.utc)


def _message(raw: object) -> Message:
    if not isinstance(raw, dict) or not {"role", "content"} <= raw.keys():
        raise ValueError("a message has no role or no content")
    known = {field.name for field in fields(Message)}
    _check(raw.keys() <= known, "a message has an unknown key")
    _check(raw["role"] in ("user", "assistant"), "a role is neither user nor assistant")
    _check(isinstance(raw["content"], str), "a message's content is not text")
    ids, partial = raw.get("ids"), raw.get("partial", False)
    if ids is not None:
        numbers = isinstance(ids, list) and all(type(id) is int and 0 <= id < 2**31 for id in ids)
        _check(numbers, "a message's ids are not token ids")
        ids = tuple(ids)
    _check(isinstance(partial, bool), "a message's partial is neither true nor false")
    thinking, tokens = raw.get("thinking", ""), raw.get("thinking_tokens", 0)
    _check(isinstance(thinking, str), "a message's thinking is not text")
    _check(type(tokens) is int and 0 <= tokens < 2**31, "a message's thinking_tokens is no count")
    return Message(raw["role"], raw["content"], ids, partial, thinking, tokens)


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
