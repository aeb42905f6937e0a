"""Saved chats as text: a table of them, one as Markdown or JSON, the code of an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC
from typing import TYPE_CHECKING, Any

from mixchat.chat.printing import one_line
from mixchat.text.tool_call import call_object

if TYPE_CHECKING:
    from mixchat.chat.saved.saved_chat import ChatSummary, SavedChat
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

    rows = [_HEADINGS]
    for chat in chats:
        used = f"{chat.updated.astimezone():%Y-%m-%d %H:%M}"
        rows.append((chat.id, used, _line(chat.model), str(chat.turns)))
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    count = len(widths)
    room = _PIPED_QUESTION_WIDTH
    if width is not None:
        while (room := width - sum(widths[:count]) - 2 * count) < _MIN_QUESTION_WIDTH and count > 1:
            count -= 1
        room = max(room, _MIN_QUESTION_WIDTH)
    about = ["ABOUT"]
    for chat in chats:
        if chat.name:
            about.append(_line(chat.name))  # whole, because it can be typed
        else:
            about.append(f'"{_shortened(_line(chat.question), room - 2)}"')
    columns = ("  ".join(map(set_cell_size, row[:count], widths)) for row in rows)
    return "\n".join(map("  ".join, zip(columns, about, strict=True)))


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
    has role (user, assistant, tool), content, reasoning_content if the model thought before its
    answer, tool_calls, tool_call_id, and "partial": true if the answer was stopped. Token
    ids are left out.
    """
    raw = {
        "id": chat.id,
        "name": chat.name,
        "model": chat.model,
        "created": chat.created.astimezone(UTC).isoformat(),
        "updated": chat.updated.astimezone(UTC).isoformat(),
        "system": chat.system,
        "sampling": dict(chat.sampling),
        "messages": [_message_object(message) for message in chat.messages],
    }
    return _well_formed(json.dumps(raw, indent=2, ensure_ascii=False)) + "\n"


def _message_object(message: Message) -> dict[str, Any]:
    return {
        "role": message.role,
        "content": message.content,
        **({"reasoning_content": message.thinking} if message.thinking else {}),
        **({"tool_calls": [call_object(call) for call in message.calls]} if message.calls else {}),
        **({"tool_call_id": message.call_id} if message.call_id else {}),
        **({"partial": True} if message.partial else {}),
    }


def to_markdown(chat: SavedChat) -> str:
    """Return the chat as Markdown (CommonMark), a heading for each turn.

    Questions are quoted, so that no heading in them can pass for one of ours. An answer is quoted
    only if it would swallow the text after it, as an unfinished code block does.
    """
    title = chat.name
    if title is None:
        asked = [message.content for message in chat.messages if message.role == "user"]
        title = " ".join(asked[0][: 5 * _MAX_TITLE].split()) if asked else ""
        title = title if len(title) <= _MAX_TITLE else f"{title[:_MAX_TITLE].rstrip()}..."
    facts = [
        f"- Model: {_escaped(chat.model)}",
        f"- Started: {chat.created.astimezone():%Y-%m-%d %H:%M}",
        f"- ID: {chat.id}",
    ]
    paragraphs = [f"# {_escaped(title or 'A chat')}", "\n".join(facts)]
    if chat.system is not None:
        paragraphs += ["## System prompt", _quoted(chat.system)]
    for message in chat.messages:
        text = message.content
        if message.role == "user":
            paragraphs += ["## You", _quoted(text)]
            continue
        if message.thinking:
            paragraphs += ["## Thinking", _quoted(message.thinking)]
        if message.role == "tool":
            paragraphs += ["## Result of a tool", _quoted(text)]
            continue
        if message.calls:
            calls = "\n".join(f"{call.name} {call.arguments}" for call in message.calls)
            paragraphs += [*([_quoted(text)] if text else []), "## Call of a tool", _quoted(calls)]
            continue
        quotes = _swallows_what_follows(text)
        paragraphs += ["## Answer", _quoted(text) if quotes else text.rstrip("\n")]
        if message.partial:
            paragraphs.append(_UNFINISHED)
    return _well_formed("\n\n".join(paragraphs)) + "\n"


def code_blocks(text: str) -> list[str]:
    """Return the content of each fenced block of a Markdown text, in order, those in lists too."""
    from markdown_it import MarkdownIt

    return [token.content for token in MarkdownIt().parse(text) if token.type == "fence"]


def _swallows_what_follows(text: str) -> bool:
    """Return whether `text` has code or HTML without an end, which would swallow a heading."""
    if not any(mark in text for mark in ("```", "~~~", "<")):
        return False  # without the parser, which is slow to load
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark")
    parser.core.ruler.disable("inline")
    return parser.parse(f"{text}\n\n## heading\n")[-1].type != "heading_close"


def _quoted(text: str) -> str:
    # In Markdown a carriage return alone ends a line, too, and would end the quote.
    lines = re.split(r"\r\n|\n|\r", text.rstrip("\r\n"))
    return "\n".join(f"> {line}" if line else ">" for line in lines)


def _escaped(text: str) -> str:
    """Return a line that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>&#~|])", r"\\\1", " ".join(text.split()))


def _well_formed(text: str) -> str:
    """Return `text` with a replacement character for each lone surrogate, which UTF-8 lacks."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
