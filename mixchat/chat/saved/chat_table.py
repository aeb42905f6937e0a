"""The table of the saved chats, as `mixchat chats` and `/chats` show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixchat.chat.printing import one_line

if TYPE_CHECKING:
    from mixchat.chat.saved.chat_store import ChatSummary

_HEADINGS = ("ID", "LAST USED", "MODEL", "TURNS")
_FEWER = ((0, 1, 2, 3), (0, 1, 2), (0, 1), (0,))  # columns to show, the less room the fewer
_LEAST, _ELSEWHERE = 20, 60  # cells that a question may take: at least, and not on a terminal


def chat_table(chats: Sequence[ChatSummary], width: int | None) -> str:
    """Return a row for each chat: columns of equal width, then its name or its first question.

    A terminal of `width` cells gets as many of the columns as leave room for a question.
    """
    from rich.cells import cell_len

    rows = [_HEADINGS, *map(_cells, chats)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    shown, room = _fitting(widths, width)
    last = ["ABOUT", *(_about(summary, room) for summary in chats)]
    columns = ("  ".join(_padded(row[at], widths[at]) for at in shown) for row in rows)
    return "\n".join(map("  ".join, zip(columns, last, strict=True)))


def _fitting(widths: Sequence[int], width: int | None) -> tuple[Sequence[int], int]:
    """Return the columns to show, and the cells that are left for a question."""
    if width is None:
        return _FEWER[0], _ELSEWHERE
    for shown in _FEWER:
        room = width - sum(widths[at] + 2 for at in shown)
        if room >= _LEAST:
            break
    return shown, max(room, _LEAST)


def _padded(cell: str, width: int) -> str:
    from rich.cells import cell_len

    return cell + " " * (width - cell_len(cell))


def _cells(summary: ChatSummary) -> tuple[str, str, str, str]:
    when = f"{summary.updated.astimezone():%Y-%m-%d %H:%M}"
    if summary.problem:
        return summary.id, when, "-", "-"
    return summary.id, when, _line(summary.model), str(summary.turns)


def _about(summary: ChatSummary, room: int) -> str:
    """Return a name whole, because it can be typed; or a question in quotes, as far as it fits."""
    if summary.problem:
        return f"cannot be read: mixchat chats {summary.id}"  # which says why
    if summary.name:
        return _line(summary.name)
    return f'"{_shortened(_line(summary.question), room - 2)}"'


def _shortened(text: str, room: int) -> str:
    """Return as much of `text` as fits into `room` cells, with dots where something is cut off."""
    from rich.cells import cell_len

    if cell_len(text) <= room:
        return text
    while cell_len(text) > room - 3:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _line(text: str) -> str:
    return one_line(" ".join(text.split()))
