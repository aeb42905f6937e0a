"""`mixchat chats`: the saved chats."""

from __future__ import annotations

import json
import sys
from datetime import datetime

import typer

from mixchat.base.errors import ChatNotFoundError, UsageError
from mixchat.chat.printing import columns, say, show
from mixchat.chat.saved.chat_text import chat_table, to_json, to_markdown
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.load_flags import JSON
from mixchat.cli.flags.settings import option
from mixchat.cli.flags.shell_completion import saved_chats

_CHAT = typer.Argument(
    None,
    metavar="ID",
    autocompletion=saved_chats,
    help="The chat's ID, a unique prefix of it, or its name.",
)
_RM = option("--rm", "Remove the chat.")
_SEARCH = option("--search WORD", "List only the chats that contain WORD.")


def chats(
    chat: str | None = _CHAT, as_json: bool = JSON, rm: bool = _RM, search: str | None = _SEARCH
) -> None:
    """List, search, print or remove saved chats."""
    if search is not None and (chat is not None or rm or not search):
        raise UsageError("--search WORD lists the chats with a word: give no ID, and no --rm")
    if rm and (chat is None or as_json):
        raise UsageError("--rm removes one chat: give its ID, and no --json")
    from mixchat.chat.saved.chat_store import ChatStore

    store = ChatStore()
    if chat is not None:
        chat = checked(chat, "the chat's ID")
        if rm:
            say(f"removed {store.remove(chat)}")
        else:
            show((to_json if as_json else to_markdown)(store.load(chat)))
        return
    saved = store.all("" if search is None else checked(search, "--search"))
    if as_json:
        show(json.dumps([*map(vars, saved)], indent=2, default=datetime.isoformat))
    elif saved:
        terminal = sys.stdout.isatty()
        show(chat_table(saved, columns(sys.stdout) if terminal else None))
        if terminal:
            say("", f"To resume one: mixchat run --resume {saved[0].id}", stream=sys.stdout)
    elif search:
        raise ChatNotFoundError(f"no saved chat has the text {search!r}")
    else:
        say(f"There are no chats in {store.directory} yet.", "'mixchat run' starts one.")
