"""Keeps a conversation on the disk while it goes on, and brings kept ones back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from mixchat.chat import parameters
from mixchat.chat.chats import Chat, ChatStore, checked_name, now
from mixchat.errors import MixchatError

if TYPE_CHECKING:
    from pathlib import Path

    from mixchat.chat.session import ChatSession


class Keeper:
    """Saves a session's chat, unless it is not to be `kept`; `warn` hears once where that fails.

    `model` is the model's name, which is kept too. A chat gets its file with its first answer.
    """

    def __init__(
        self,
        session: ChatSession,
        store: ChatStore,
        model: str,
        *,
        kept: bool = True,
        warn: Callable[[Exception], object] = lambda error: None,
    ) -> None:
        self.store, self.kept = store, kept
        self._keeps = kept
        self.session, self._model, self._warn = session, model, warn
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
        if not self.kept or not (self.session.history or self._has_file):
            return
        try:
            self._write()
            self._warned = False
        except MixchatError as error:
            if not self._warned:
                self._warn(error)
            self._warned = True

    def rename(self, name: str | None) -> None:
        """Keep the chat, from now on if it was not, under this name if one is given.

        Raises `UsageError` where the name is taken or cannot be one, else as `ChatStore.save`.
        """
        name = None if name is None else checked_name(name)
        self.kept = True
        self._write()
        if name is not None:
            self.chat = self.store.rename(self.chat, name)

    def resume(self, chat: Chat, but: Collection[str] = ()) -> None:
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

    def current(self) -> Chat:
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
        if self._was_changed_elsewhere():
            self.chat = replace(self.chat, id=self.store.new_id(self.chat.created), name=None)
            self._warn(
                MixchatError(
                    f"this chat was gone on with elsewhere: what is said here is kept as "
                    f"{self.chat.id}"
                )
            )
        chat = self.current()
        self.store.save(chat)
        self.chat, self._has_file = chat, True

    def _was_changed_elsewhere(self) -> bool:
        """Whether the file has another state of the chat than we wrote or read last."""
        try:
            return self.store.load(self.chat.id).updated != self.chat.updated
        except (MixchatError, OSError):  # not there yet, removed, or damaged
            return False

    def _new_chat(self) -> Chat:
        began, self._has_file = now(), False
        return Chat(
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
