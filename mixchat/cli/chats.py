"""`mixchat chats`: the saved chats."""

from __future__ import annotations

import json
import sys

import typer

from mixchat.base.errors import UsageError
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


def chats(chat: str | None = _CHAT, as_json: bool = JSON, rm: bool = _RM) -> None:
    """List the saved chats, print one as Markdown, or remove one."""
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
    saved = store.all()
    if as_json:
        keys = ("id", "name", "model", "turns", "question", "problem")
        entries = [{key: vars(summary)[key] for key in keys} for summary in saved]
        for entry, summary in zip(entries, saved, strict=True):
            for key, moment in (("created", summary.created), ("updated", summary.updated)):
                entry[key] = moment and moment.isoformat()
            entry["path"] = str(summary.path)
        show(json.dumps(entries, indent=2))
    elif saved:
        terminal = sys.stdout.isatty()
        show(chat_table(saved, columns(sys.stdout) if terminal else None))
        whole = [summary.id for summary in saved if summary.problem is None]
        if whole and terminal:
            say("", f"To resume one: mixchat run --resume {whole[0]}", stream=sys.stdout)
    else:
        say(f"There are no chats in {store.directory} yet.", "'mixchat run' starts one.")
