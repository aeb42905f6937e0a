"""Begins a chat in the terminal: kept or not, new or one of before, with its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mixchat import interrupts
from mixchat.cli.output.failure import note, report
from mixchat.cli.prompt_cache import has_content, load_cache, save_cache
from mixchat.errors import ChatNotFoundError, MixchatError, ResourceError
from mixchat.settings import data_dir

if TYPE_CHECKING:
    from pathlib import Path

    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession, Finished
    from mixchat.engine.prompt_cache import PromptCache


def find_chat(wanted: str | None) -> SavedChat | None:
    """The kept chat of this ID or name, or the last one. Raises `ChatNotFoundError`."""
    if wanted is None:
        return None
    from mixchat.chat.saved.chat_store import ChatStore

    try:
        return ChatStore().load(wanted)
    except ChatNotFoundError as error:
        if " " in wanted:  # rather a question
            error.hint = "A PROMPT goes before --resume, or behind --resume ID."
        raise


def new_saver(session: ChatSession, model: str, *, kept: bool) -> ChatSaver:
    """What keeps the session's chat."""
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.saved.chat_store import ChatStore

    return ChatSaver(session, ChatStore(), model, kept=kept, warn=report, note=note)


@contextmanager
def saved_turn(saver: ChatSaver, wished: bool) -> Iterator[None]:
    """Save what is answered meanwhile, if that is wished; also where it could not be printed.

    Raises `ResourceError` where it cannot be saved, for whatever reason: a script that asked for it
    has to know. After another error that is only said.
    """
    before = saver.session.history
    try:
        yield
    except BaseException:
        if wished and saver.session.history is not before:
            with interrupts.held(), interrupts.saving():
                saver.save()
        raise
    if wished and saver.session.history is not before:
        try:
            with interrupts.held(), interrupts.saving():
                saver.save_or_raise()
        except MixchatError as error:
            hint = "The answer is whole. Free some space, or let MIXCHAT_HOME name another place."
            raise ResourceError(str(error), hint=hint) from None


class ChatCache:
    """The KV cache that lies beside a chat: kept where that is wished, or was for it before.

    `strict`: where the file that is wished cannot be written at the end, that is raised, not said.
    """

    def __init__(self, saver: ChatSaver, wished: bool, *, strict: bool = False) -> None:
        self._saver, self._wished, self._strict = saver, wished, wished and strict
        self._loaded: PromptCache | None = None

    def __enter__(self) -> ChatCache:
        self.load()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._strict and kind is None:
            self._save()
        else:
            self.save()

    def load(self) -> None:
        """Let the engine go on from what the chat has, if it has something."""
        engine = self._saver.session.engine
        engine.forget()  # what another chat has left there is not this one's
        self._loaded = load_cache(self._saver.kv_path, engine)

    def save(self) -> None:
        """Keep what the engine holds; what keeps it from that is said, and no more."""
        try:
            self._save()
        except MixchatError as error:
            report(error)

    def _save(self) -> None:
        saver = self._saver
        if not saver.kept or not (self._wished or has_content(saver.kv_path)):
            return
        if not saver.session.history:  # all was taken back
            saver.kv_path.unlink(missing_ok=True)
            return
        loaded = self._loaded
        if loaded is not None and loaded.path != saver.kv_path:
            loaded = None  # another chat's
        save_cache(saver.kv_path, saver.session.engine, loaded)


def begin_chat(
    saver: ChatSaver,
    cache: ChatCache | None,
    model: str,
    files: Mapping[Path, str] = MappingProxyType({}),
    *,
    raw: bool,
    vi: bool,
    after_turn: Callable[[Finished], None],
) -> None:
    """Talk until somebody leaves; the texts of files go before the first question."""
    from mixchat.chat.terminal.prompt import ChatPrompt
    from mixchat.chat.terminal.repl import Repl
    from mixchat.chat.terminal.screen import Screen

    history = data_dir() / "history" if saver.kept else None

    def make_prompt(commands: Any, status: Callable[[], str]) -> ChatPrompt:
        return ChatPrompt(history, commands, status, vi=vi, warn=note)

    screen = Screen(raw=raw)
    screen.say(f"{model}; /help shows the commands, Ctrl-D leaves")
    repl = Repl(
        saver.session,
        screen,
        saver,
        make_prompt,
        report=report,
        after_turn=after_turn,
        model=model,
    )
    if cache is not None:
        repl.cache = cache
    if saver.session.history:
        repl.show(saver.chat)
    for path, text in files.items():
        repl.attach(path, text)
    repl.run()
