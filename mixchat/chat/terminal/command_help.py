"""The text of /help, and hints for commands that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from itertools import zip_longest

from mixchat.chat.parameters import NAMES

# The names of our commands in other programs.
_HABITS = {
    **dict.fromkeys(("retry", "regenerate", "again", "r"), "/regen"),
    **dict.fromkeys(("new", "reset", "restart", "forget", "cls"), "/clear"),
    **dict.fromkeys(("h", "commands", "usage", "man"), "/help"),
    **dict.fromkeys(("q", "x", "leave", "close", "end"), "/bye"),
    **dict.fromkeys(("list", "ls", "history", "sessions"), "/chats"),
    **dict.fromkeys(("resume", "open", "restore"), "/load"),
    **dict.fromkeys(("file", "add", "attach", "paste"), "/read"),
    **dict.fromkeys(("back", "pop", "delete"), "/undo"),
    **dict.fromkeys(("go", "more", "cont"), "/continue"),
    **dict.fromkeys(("info", "status"), "/show"),
    **dict.fromkeys(("param", "params", "parameter", "parameters", "options"), "/set"),
    **dict.fromkeys(("write", "dump", "download"), "/export"),
    **dict.fromkeys(("prompt", "role", "persona"), "/system"),
    **{name: f"/set {name}" for name in NAMES},
    **dict.fromkeys(("models", "switch"), "/model"),
    "temperature": "/set temp",
    "context": "/tokens",
    "markdown": "/raw",
}
_KEYS = (
    'Alt-Enter, Ctrl-J  new line; or put """ before and after several lines',
    "Ctrl-X Ctrl-E      write in your editor",
    "Ctrl-R             search your earlier questions",
    "Ctrl-C             stop the answer; clear the line; twice on an empty one: leave",
    "/help COMMAND      more about a command, as in /help read",
)


def help_text(table: Mapping[str, str], width: int) -> str:
    """Return the commands and keys, the commands in two columns if `width` cells have room.

    `table` has the help of each command by its usage.
    """
    longest = max(map(len, table))
    lines = [f"{usage:{longest}}  {text}" for usage, text in table.items()]
    column = max(map(len, lines)) + 2
    if 2 * column - 2 <= width:
        half = (len(lines) + 1) // 2
        pairs = zip_longest(lines[:half], lines[half:], fillvalue="")
        lines = [f"{left:{column}}{right}".rstrip() for left, right in pairs]
    return "\n".join([*lines, "", *_KEYS])


def hint_for(name: str, names: Iterable[str]) -> str:
    """Return a hint at the command that is `name` in another program, or one with a near name."""
    if name in _HABITS:
        return f"Did you mean {_HABITS[name]}?"
    near = difflib.get_close_matches(name, names, 1)
    return f"Did you mean /{near[0]}?" if near else "/help shows them all."
