"""`mixchat chats`: the chats that are kept; one of them as text; or removed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixchat.chat.sanitize import sanitize
from mixchat.cli.arguments import checked
from mixchat.cli.completion import kept_chats
from mixchat.errors import UsageError

if TYPE_CHECKING:
    from mixchat.chat.chats import ChatStore, ChatSummary

_HEADINGS = ("ID", "LAST USED", "MODEL", "TURNS")
_LEAST, _ELSEWHERE = 20, 60  # cells that a question may take: at least, and not on a terminal


def chats(
    chat: Annotated[
        str | None,
        typer.Argument(
            metavar="ID",
            autocompletion=kept_chats,
            help="Its ID, what only its ID begins with, or its name.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    rm: Annotated[bool, typer.Option("--rm", help="Remove the chat.")] = False,
) -> None:
    """List the chats that are kept, or print one as Markdown."""
    if rm and (chat is None or as_json):
        raise UsageError("--rm removes one chat: it takes an ID, and no --json")
    from mixchat.chat.chats import ChatStore

    store = ChatStore()
    if chat is None:
        _list(store, as_json)
    elif rm:
        print(f"removed {store.remove(_checked(chat))}", file=sys.stderr)
    else:
        _print(store, _checked(chat), as_json)


def _checked(chat: str) -> str:
    return checked(chat, "the chat's ID")


def _print(store: ChatStore, wanted: str, as_json: bool) -> None:
    from mixchat.chat.export import to_json, to_markdown

    text = (to_json if as_json else to_markdown)(store.load(wanted))
    print(sanitize(text) if sys.stdout.isatty() else text, end="")


def _list(store: ChatStore, as_json: bool) -> None:
    kept = store.all()
    if as_json:
        print(json.dumps([_as_json(summary) for summary in kept], indent=2))
    elif kept:
        print(_table(kept))
        whole = [summary.id for summary in kept if summary.problem is None]
        if whole and sys.stdout.isatty():
            print(f"\nTo go on with one: mixchat run --resume {whole[0]}")
    else:
        print(f"There are no chats in {store.directory} yet.", file=sys.stderr)
        print("'mixchat run' begins one.", file=sys.stderr)


def _as_json(summary: ChatSummary) -> dict[str, Any]:
    keys = ("id", "name", "model", "turns", "question", "problem")
    times = {"created": summary.created, "updated": summary.updated}
    return (
        {key: vars(summary)[key] for key in keys}
        | {key: time and time.isoformat() for key, time in times.items()}
        | {"path": str(summary.path)}
    )


def _table(kept: Sequence[ChatSummary]) -> str:
    """A row for each chat: columns of equal width, and the name or the question behind them."""
    from rich.cells import cell_len

    rows = [_HEADINGS, *map(_cells, kept)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    room = _room(sum(widths) + 2 * len(widths))
    last = ["ABOUT", *(_about(summary, room) for summary in kept)]
    columns = ("  ".join(map(_padded, row, widths)) for row in rows)
    return "\n".join(map("  ".join, zip(columns, last, strict=True)))


def _padded(cell: str, width: int) -> str:
    from rich.cells import cell_len

    return cell + " " * (width - cell_len(cell))


def _cells(summary: ChatSummary) -> tuple[str, str, str, str]:
    when = f"{summary.updated.astimezone():%Y-%m-%d %H:%M}"
    if summary.problem:
        return summary.id, when, "-", "-"
    return summary.id, when, _line(summary.model), str(summary.turns)


def _room(taken: int) -> int:
    """Cells that are left for a question."""
    if not sys.stdout.isatty():
        return _ELSEWHERE
    return max(shutil.get_terminal_size().columns - taken, _LEAST)


def _about(summary: ChatSummary, room: int) -> str:
    """A name is shown whole, because it can be typed; a question in quotes, as far as it fits."""
    if summary.problem:
        return f"damaged: mixchat chats --rm {summary.id}"
    if summary.name:
        return _line(summary.name)
    return f'"{_shortened(_line(summary.question), room - 2)}"'


def _shortened(text: str, room: int) -> str:
    """As much of `text` as takes no more cells than `room`, with dots where something is gone."""
    from rich.cells import cell_len

    if cell_len(text) <= room:
        return text
    while cell_len(text) > room - 3:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _line(text: str) -> str:
    return sanitize(" ".join(text.split()))
