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

    from mixchat.chat.saved.chats import Chat
    from mixchat.chat.saved.keeper import Keeper
    from mixchat.chat.session import ChatSession, Finished
    from mixchat.engine.prompt_cache import PromptCache


def find_chat(wanted: str | None) -> Chat | None:
    """The kept chat of this ID or name, or the last one. Raises `ChatNotFoundError`."""
    if wanted is None:
        return None
    from mixchat.chat.saved.chats import ChatStore

    try:
        return ChatStore().load(wanted)
    except ChatNotFoundError as error:
        if " " in wanted:  # rather a question
            error.hint = "A PROMPT goes before --resume, or behind --resume ID."
        raise


def new_keeper(session: ChatSession, model: str, *, kept: bool) -> Keeper:
    """What keeps the session's chat."""
    from mixchat.chat.saved.chats import ChatStore
    from mixchat.chat.saved.keeper import Keeper

    return Keeper(session, ChatStore(), model, kept=kept, warn=report, note=note)


@contextmanager
def saved_turn(keeper: Keeper, wished: bool) -> Iterator[None]:
    """Save what is answered meanwhile, if that is wished; also where it could not be printed.

    Raises `ResourceError` where it cannot be saved, for whatever reason: a script that asked for it
    has to know. After another error that is only said.
    """
    before = keeper.session.history
    try:
        yield
    except BaseException:
        if wished and keeper.session.history is not before:
            with interrupts.held(), interrupts.saving():
                keeper.save()
        raise
    if wished and keeper.session.history is not before:
        try:
            with interrupts.held(), interrupts.saving():
                keeper.save_or_raise()
        except MixchatError as error:
            hint = "The answer is whole. Free some space, or let MIXCHAT_HOME name another place."
            raise ResourceError(str(error), hint=hint) from None


class ChatCache:
    """The KV cache that lies beside a chat: kept where that is wished, or was for it before.

    `strict`: where the file that is wished cannot be written at the end, that is raised, not said.
    """

    def __init__(self, keeper: Keeper, wished: bool, *, strict: bool = False) -> None:
        self._keeper, self._wished, self._strict = keeper, wished, wished and strict
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
        engine = self._keeper.session.engine
        engine.forget()  # what another chat has left there is not this one's
        self._loaded = load_cache(self._keeper.kv_path, engine)

    def save(self) -> None:
        """Keep what the engine holds; what keeps it from that is said, and no more."""
        try:
            self._save()
        except MixchatError as error:
            report(error)

    def _save(self) -> None:
        keeper = self._keeper
        if not keeper.kept or not (self._wished or has_content(keeper.kv_path)):
            return
        if not keeper.session.history:  # all was taken back
            keeper.kv_path.unlink(missing_ok=True)
            return
        loaded = self._loaded
        if loaded is not None and loaded.path != keeper.kv_path:
            loaded = None  # another chat's
        save_cache(keeper.kv_path, keeper.session.engine, loaded)


def begin_chat(
    keeper: Keeper,
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
    if cache is not None:
        repl.cache = cache
    if keeper.session.history:
        repl.show(keeper.chat)
    for path, text in files.items():
        repl.attach(path, text)
    repl.run()
