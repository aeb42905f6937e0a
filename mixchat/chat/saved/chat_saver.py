"""Keeps a conversation on the disk while it goes on, and brings kept ones back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from mixchat.chat import parameters
from mixchat.chat.saved.chat_file import SavedChat, checked_name, now
from mixchat.chat.saved.chat_store import ChatStore
from mixchat.errors import MixchatError

if TYPE_CHECKING:
    from pathlib import Path

    from mixchat.chat.session import ChatSession


class ChatSaver:
    """Saves a session's chat, unless it is not to be `kept`; `warn` hears once where that fails.

    `model` is the model's name, which is kept too. A chat gets its file with its first answer.
    `note` hears a line where another session changed the file: both chats are kept then.
    """

    def __init__(
        self,
        session: ChatSession,
        store: ChatStore,
        model: str,
        *,
        kept: bool = True,
        warn: Callable[[Exception], object] = lambda error: None,
        note: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.store, self.kept = store, kept
        self._keeps = kept
        self.session, self._model, self._warn, self._note = session, model, warn, note
        self._warned = False
        self.chat = self._new_chat()

    @property
    def kv_path(self) -> Path:
        """Where this chat's KV cache may be kept."""
        return self.store.kv_path(self.chat.id)

    def begin(self) -> None:
        """A new chat from here on; the old one stays as it is."""
        self.chat, self.kept = self._new_chat(), self._keeps

    def save(self) -> None:
        """Write the chat as it is now, if it is to be kept."""
        try:
            self.save_or_raise()
            self._warned = False
        except MixchatError as error:
            if not self._warned:
                self._warn(error)
            self._warned = True

    def save_or_raise(self) -> None:
        """`save` that raises the `MixchatError`, for where nobody would look at a warning."""
        if self.kept and (self.session.history or self._has_file):
            self._write()

    def rename(self, name: str | None) -> None:
        """Keep the chat, from now on if it was not, under this name if one is given.

        Raises `UsageError` where the name is taken or cannot be one, else as `ChatStore.save`.
        """
        name = None if name is None else checked_name(name)
        self.kept = True
        self._write()
        if name is not None:
            self._is_saved(self.store.rename(self.chat, name))

    def resume(self, chat: SavedChat, but: Collection[str] = ()) -> None:
        """Let the session go on with a kept chat: its turns, its system prompt, its sampling; `but`
        names what of the latter two stays as it is.

        The tokens of answers that another model gave are forgotten, their text is not.
        """
        session, same = self.session, chat.identity == self.session.engine.identity
        messages = chat.messages if same else [replace(m, ids=None) for m in chat.messages]
        session.restore(messages)
        if "system" not in but:
            session.system = chat.system
        kept = {name: value for name, value in chat.sampling.items() if name not in but}
        session.sampling = parameters.restored(kept, session.sampling)
        self.chat, self.kept, self._has_file = chat, self._keeps, True

    def current(self) -> SavedChat:
        """The chat as it is now."""
        return replace(
            self.chat,
            model=self._model,
            identity=self.session.engine.identity,
            updated=now(),
            system=self.session.system,
            sampling=parameters.kept(self.session),
            messages=tuple(self.session.history),
        )

    def _write(self) -> None:
        self._is_saved(self.store.save_over(self.chat if self._has_file else None, self.current()))

    def _is_saved(self, chat: SavedChat) -> None:
        """Go on with the chat as the store has saved it."""
        if self._has_file and chat.id != self.chat.id:
            self._note(f"this chat was changed in another session; saved as {chat.id}")
        self.chat, self._has_file = chat, True

    def _new_chat(self) -> SavedChat:
        began, self._has_file = now(), False
        return SavedChat(
            id=self.store.new_id(began),
            name=None,
            model=self._model,
            identity=self.session.engine.identity,
            created=began,
            updated=began,
            system=self.session.system,
            sampling={},
            messages=(),
        )
