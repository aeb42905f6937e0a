"""Starts or resumes a chat in the terminal, and saves the answer to a single prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

from mixchat.base import interrupts
from mixchat.base.errors import ChatNotFoundError, MixchatError, ResourceError
from mixchat.base.settings import data_dir
from mixchat.cli.output.failure import note, print_error

if TYPE_CHECKING:
    from pathlib import Path

    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession
    from mixchat.chat.terminal.active_chat import AfterTurn, ChatCache, ChatModels, Predict


def find_chat(wanted: str | None) -> SavedChat | None:
    """Return the saved chat of this ID or name, or the last one. Raises `ChatNotFoundError`."""
    if wanted is None:
        return None
    from mixchat.chat.saved.chat_store import ChatStore

    try:
        return ChatStore().load(wanted)
    except ChatNotFoundError as error:
        if " " in wanted:  # it looks like a question
            error.hint = "Put a PROMPT before --resume, or after --resume ID."
        raise


def new_saver(session: ChatSession, model: str, *, autosave: bool) -> ChatSaver:
    """Return the saver of a session's chat, which prints what goes wrong."""
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.saved.chat_store import ChatStore

    return ChatSaver(session, ChatStore(), model, autosave=autosave, warn=print_error, note=note)


@contextmanager
def saved_turn(saver: ChatSaver) -> Iterator[None]:
    """Save the answer that the block brings, also where it could not be printed.

    Raises `ResourceError` where it cannot be saved, for whatever reason: a script that asked for it
    has to know. After another error, a failure to save is only printed.
    """
    before = saver.session.history
    try:
        yield
    except BaseException:
        if saver.session.history is not before:
            with interrupts.deferred(), interrupts.saving():
                saver.save()
        raise
    if saver.session.history is not before:
        try:
            with interrupts.deferred(), interrupts.saving():
                saver.save_or_raise()
        except MixchatError as error:
            hint = "The answer is whole. Free some space, or set MIXCHAT_HOME to another place."
            raise ResourceError(str(error), hint=hint) from None


def start_chat(
    saver: ChatSaver,
    cache: ChatCache,
    models: ChatModels,
    files: Mapping[Path, str] = MappingProxyType({}),
    *,
    raw: bool,
    vi: bool,
    after_turn: AfterTurn,
    predict: Predict,
) -> None:
    """Chat in the terminal; the texts of `files` go before the first question.

    predict: the seconds that so many tokens of a prompt should take, in the first turn or later.
    """
    from mixchat.chat.terminal.active_chat import ActiveChat
    from mixchat.chat.terminal.commands import completions
    from mixchat.chat.terminal.prompt import ChatPrompt
    from mixchat.chat.terminal.repl import Repl
    from mixchat.chat.terminal.screen import Screen

    screen = Screen(raw=raw)
    screen.say(f"{saver.model}; /help shows the commands, Ctrl-D leaves")
    chat = ActiveChat(
        saver,
        screen,
        cache,
        models=models,
        report=print_error,
        after_turn=after_turn,
        predict=predict,
    )
    if saver.session.history:
        chat.show_last_turn()
    for path, text in files.items():
        chat.attach(path, text)
    history = data_dir() / "history" if saver.autosave else None
    Repl(chat, ChatPrompt(history, completions(chat), chat.status, vi=vi, warn=note)).run()
