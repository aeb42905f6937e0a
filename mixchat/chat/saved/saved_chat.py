"""A saved chat, its summary, and the names that it can have."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime

from mixchat.base.errors import UsageError
from mixchat.base.sanitize import sanitize
from mixchat.text.messages import Message

MAX_NAME = 80  # characters
LAST = "last"  # in place of an ID, means the chat that was saved last
# The beginning of an ID. No name looks like one, so that no word means two chats.
ID_PREFIX = re.compile(r"[0-9]{1,8}|[0-9]{8}-[0-9]{0,4}|[0-9]{8}-[0-9]{4}-[a-z0-9]{0,3}")


@dataclass(frozen=True)
class SavedChat:
    """A conversation, and everything that resuming it takes.

    `model` is its name as typed, `identity` the hash of its weights. `sampling` has the chosen
    numbers by the names of `SamplingOptions`. The system prompt is not among the messages.
    `revision` counts the times that the chat was saved.
    """

    id: str
    name: str | None
    model: str
    identity: str
    created: datetime
    updated: datetime
    system: str | None
    sampling: dict[str, int | float]
    messages: tuple[Message, ...]
    revision: int = field(default=0, compare=False)


@dataclass(frozen=True)
class ChatSummary:
    """A saved chat in a line. `question` is the beginning of the first one, on one line."""

    id: str
    name: str | None
    model: str
    turns: int
    question: str
    created: datetime
    updated: datetime


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
