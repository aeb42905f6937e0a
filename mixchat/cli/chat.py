"""Begins a chat in the terminal: kept or not, new or one of before, with its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mixchat.chat.chat_file import LAST
from mixchat.cli.prompt_cache import keeping
from mixchat.cli.report import note, report
from mixchat.errors import ChatNotFoundError
from mixchat.settings import data_dir

if TYPE_CHECKING:
    from pathlib import Path

    from mixchat.chat.chats import Chat
    from mixchat.chat.keeper import Keeper
    from mixchat.chat.session import ChatSession, Finished


def find_chat(wanted: str | None) -> Chat | None:
    """The kept chat of this ID or name, or the last one. Raises `ChatNotFoundError`."""
    if wanted is None:
        return None
    from mixchat.chat.chats import ChatStore

    store = ChatStore()
    try:
        return store.latest() if wanted == LAST else store.load(wanted)
    except ChatNotFoundError as error:
        if " " in wanted:  # rather a question
            error.hint = "A PROMPT goes before --resume, or behind --resume ID."
        raise


def new_keeper(session: ChatSession, model: str, *, kept: bool) -> Keeper:
    """What keeps the session's chat."""
    from mixchat.chat.chats import ChatStore
    from mixchat.chat.keeper import Keeper

    return Keeper(session, ChatStore(), model, kept=kept, warn=report)


def keeping_its_cache(keeper: Keeper, wished: bool) -> AbstractContextManager[None]:
    """Lets the engine go on from the KV cache that lies beside the chat; keeps it there at the end.

    It is kept where that is wished, or was for this chat before.
    """

    def at_end() -> Path | None:
        wanted = keeper.kept and (wished or keeper.kv_path.exists())
        return keeper.kv_path if wanted and keeper.session.history else None

    return keeping(keeper.kv_path, keeper.session.engine, at_end)


def begin_chat(
    keeper: Keeper,
    model: str,
    files: Mapping[Path, str] = MappingProxyType({}),
    *,
    raw: bool,
    vi: bool,
    after_turn: Callable[[Finished], None],
) -> None:
    """Talk until somebody leaves; the texts of files go before the first question."""
    from mixchat.chat.prompt import ChatPrompt
    from mixchat.chat.repl import Repl
    from mixchat.chat.screen import Screen

    history = data_dir() / "history" if keeper.kept else None

    def make_prompt(commands: Any, status: Callable[[], str]) -> ChatPrompt:
        return ChatPrompt(history, commands, status, vi=vi, warn=note)

    screen = Screen(raw=raw)
    screen.say(f"{model}; /help shows the commands, Ctrl-D leaves")
    repl = Repl(
        keeper.session,
        screen,
        keeper,
        make_prompt,
        report=report,
        after_turn=after_turn,
        model=model,
    )
    if keeper.session.history:
        repl.show(keeper.chat)
    repl.attached.update({str(path): text for path, text in files.items()})
    repl.run()
