"""Saved chats as text, which is the table of all, or one chat as Markdown or JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixchat.base.output_file import OutputFile
from mixchat.chat.printing import one_line
from mixchat.chat.saved.chat_file import as_json

if TYPE_CHECKING:
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_store import ChatSummary
    from mixchat.text.messages import Message

_HEADINGS = ("ID", "LAST USED", "MODEL", "TURNS")
_MIN_QUESTION_WIDTH = 20  # cells
_PIPED_QUESTION_WIDTH = 60  # cells, if the table does not go to a terminal
_MAX_TITLE = 80  # characters
_UNFINISHED = "*(unfinished)*"


def chat_table(chats: Sequence[ChatSummary], width: int | None) -> str:
    """Return a row for each chat, with its name or its first question in the last column.

    A terminal of `width` cells gets as many columns as leave room for a question.
    """
    from rich.cells import cell_len, set_cell_size

    rows = [_HEADINGS, *map(_cells, chats)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    count, room = _fitting(widths, width)
    last = ["ABOUT", *(_about(summary, room) for summary in chats)]
    columns = ("  ".join(map(set_cell_size, row[:count], widths)) for row in rows)
    return "\n".join(map("  ".join, zip(columns, last, strict=True)))


def _fitting(widths: Sequence[int], width: int | None) -> tuple[int, int]:
    """Return how many columns to show, and the cells that are left for a question."""
    if width is None:
        return len(widths), _PIPED_QUESTION_WIDTH
    for count in range(len(widths), 0, -1):
        room = width - sum(cells + 2 for cells in widths[:count])
        if room >= _MIN_QUESTION_WIDTH:
            break
    return count, max(room, _MIN_QUESTION_WIDTH)


def _cells(summary: ChatSummary) -> tuple[str, str, str, str]:
    used = f"{summary.updated.astimezone():%Y-%m-%d %H:%M}"
    if summary.problem:
        return summary.id, used, "-", "-"
    return summary.id, used, _line(summary.model), str(summary.turns)


def _about(summary: ChatSummary, room: int) -> str:
    """Return the whole name, because it can be typed, or the question in quotes if it fits."""
    if summary.problem:
        return f"cannot be read: mixchat chats {summary.id}"  # which says why
    if summary.name:
        return _line(summary.name)
    return f'"{_shortened(_line(summary.question), room - 2)}"'


def _shortened(text: str, room: int) -> str:
    """Return as much of `text` as fits into `room` cells, with dots if something is cut off."""
    from rich.cells import cell_len

    if cell_len(text) <= room:
        return text
    while cell_len(text) > room - 3:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _line(text: str) -> str:
    return one_line(" ".join(text.split()))


def to_json(chat: SavedChat) -> str:
    """Return the chat as a JSON object, with its messages in the form of OpenAI's API.

    Keys: id, name, model, created, updated (ISO 8601, UTC), system, sampling, messages. A message
    has role (user, assistant), content, reasoning_content if the model thought before its answer,
    and "partial": true if the answer was stopped. Token ids are left out.
    """
    messages = tuple(replace(message, ids=None, thinking_tokens=0) for message in chat.messages)
    raw = {"id": chat.id, **as_json(replace(chat, messages=messages))}
    del raw["identity"]
    for message in raw["messages"]:
        if "thinking" in message:
            message["reasoning_content"] = message.pop("thinking")
    return _well_formed(json.dumps(raw, indent=2, ensure_ascii=False)) + "\n"


def to_markdown(chat: SavedChat) -> str:
    """Return the chat as Markdown (CommonMark), a heading for each turn.

    Questions are quoted, so that no heading in them can pass for one of ours. An answer is quoted
    only if it would swallow the text after it, as an unfinished code block does.
    """
    title = _escaped(chat.name or _first_question(chat) or "A chat")
    facts = [
        f"- Model: {_escaped(chat.model)}",
        f"- Started: {chat.created.astimezone():%Y-%m-%d %H:%M}",
        f"- ID: {chat.id}",
    ]
    parts = [f"# {title}", "\n".join(facts)]
    if chat.system is not None:
        parts += ["## System prompt", _quoted(chat.system)]
    for message in chat.messages:
        parts += _turn(message)
    return _well_formed("\n\n".join(parts)) + "\n"


def write_export(chat: SavedChat, path: Path) -> None:
    """Write a chat to a new file, as JSON if its suffix is .json, else as Markdown.

    Raises `UsageError` or `ResourceError`, and leaves no file then.
    """
    text = to_json(chat) if path.suffix == ".json" else to_markdown(chat)
    OutputFile("/export", path, streams=False).write(text.encode())


def _turn(message: Message) -> list[str]:
    if message.role == "user":
        return ["## You", _quoted(message.content)]
    text = message.content
    return [
        *(["## Thinking", _quoted(message.thinking)] if message.thinking else []),
        "## Answer",
        _quoted(text) if _swallows_what_follows(text) else text.rstrip("\n"),
        *([_UNFINISHED] if message.partial else []),
    ]


def _first_question(chat: SavedChat) -> str:
    """Return the beginning of the first question on one line, empty without one."""
    for message in chat.messages:
        if message.role == "user":
            line = " ".join(message.content[: 5 * _MAX_TITLE].split())
            return line if len(line) <= _MAX_TITLE else f"{line[:_MAX_TITLE].rstrip()}..."
    return ""


def _swallows_what_follows(text: str) -> bool:
    """Return whether `text` has code or HTML without an end, which would swallow a heading."""
    if not any(mark in text for mark in ("```", "~~~", "<")):
        return False  # without the parser, which is slow to load
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark")
    parser.core.ruler.disable("inline")
    return parser.parse(f"{text}\n\n## heading\n")[-1].type != "heading_close"


def _quoted(text: str) -> str:
    lines = re.split(r"\r\n|\n|\r", text.rstrip("\r\n"))
    return "\n".join(f"> {line}" if line else ">" for line in lines)


def _escaped(text: str) -> str:
    """Return a line that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>&#~|])", r"\\\1", " ".join(text.split()))


def _well_formed(text: str) -> str:
    """Return `text` with a replacement character for each lone surrogate, which UTF-8 lacks."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
