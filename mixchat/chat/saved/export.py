"""Exports a chat: as Markdown for people, as JSON for programs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixchat.base.output_file import OutputFile

if TYPE_CHECKING:
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.text.messages import Message

_LONGEST_TITLE = 80  # characters
_UNFINISHED = "*(unfinished)*"


def to_json(chat: SavedChat) -> str:
    """Return the chat as a JSON object, with its messages in the form of OpenAI's API.

    Keys: id, name, model, created, updated (ISO 8601, UTC), system, sampling, and messages, each
    with role (user, assistant), content, and "partial": true where the answer was stopped. Token
    ids are left out.
    """
    raw = {
        "id": chat.id,
        "name": chat.name,
        "model": chat.model,
        "created": chat.created.isoformat(),
        "updated": chat.updated.isoformat(),
        "system": chat.system,
        "sampling": dict(chat.sampling),
        "messages": [_as_openai_has_it(message) for message in chat.messages],
    }
    return _well_formed(json.dumps(raw, indent=2, ensure_ascii=False)) + "\n"


def to_markdown(chat: SavedChat) -> str:
    """Return the chat as Markdown (CommonMark), a heading for each turn.

    Answers are word for word. Questions are quoted, so that no heading in them can pass for one of
    ours; so is an answer that would swallow what follows it, such as an unfinished block of code.
    """
    title = _escaped(chat.name or _first_question(chat) or "A chat")
    about = [
        f"- Model: {_escaped(chat.model)}",
        f"- Started: {chat.created.astimezone():%Y-%m-%d %H:%M}",
        f"- ID: {chat.id}",
    ]
    parts = [f"# {title}", "\n".join(about)]
    if chat.system is not None:
        parts += ["## System prompt", _quoted(chat.system)]
    for message in chat.messages:
        parts += _turn(message)
    return _well_formed("\n\n".join(parts)) + "\n"


def write_export(chat: SavedChat, path: Path) -> None:
    """Write a chat to a new file: as JSON where its name ends with .json, else as Markdown.

    Raises `UsageError` or `ResourceError` where that cannot be done; no file is left then.
    """
    text = to_json(chat) if path.suffix == ".json" else to_markdown(chat)
    OutputFile("/export", path, streams=False).write(text.encode())


def _as_openai_has_it(message: Message) -> dict[str, Any]:
    raw: dict[str, Any] = {"role": message.role, "content": message.content}
    return raw | {"partial": True} if message.partial else raw


def _turn(message: Message) -> list[str]:
    if message.role == "user":
        return ["## You", _quoted(message.content)]
    text = message.content
    return [
        "## Answer",
        _quoted(text) if _swallows_what_follows(text) else text.rstrip("\n"),
        *([_UNFINISHED] if message.partial else []),
    ]


def _first_question(chat: SavedChat) -> str:
    """Return the beginning of the first question, on one line; empty if there is none."""
    for message in chat.messages:
        if message.role == "user":
            line = " ".join(message.content[: 5 * _LONGEST_TITLE].split())
            return line if len(line) <= _LONGEST_TITLE else f"{line[:_LONGEST_TITLE].rstrip()}..."
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
