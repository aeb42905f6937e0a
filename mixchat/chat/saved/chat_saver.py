"""Saves a session's chat after each turn, and resumes saved chats."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mixchat.base.errors import MixchatError
from mixchat.base.options import accepted_numbers
from mixchat.chat.saved.chat_store import ChatStore, new_id
from mixchat.chat.saved.saved_chat import SavedChat

if TYPE_CHECKING:
    from pathlib import Path

    from mixchat.chat.session import ChatSession


class ChatSaver:
    """Saves the chat of `session` in the store, from its first answer on, if `autosave` is on.

    `model` is the model's name, which is saved with it. `warn` is called with the first of several
    failures in a row. If another session changed the chat, both chats are saved, and `note` is
    called with a line. `fault` says why the turns so far are not saved, if they should be.
    """

    def __init__(
        self,
        session: ChatSession,
        store: ChatStore,
        model: str,
        *,
        autosave: bool = True,
        warn: Callable[[Exception], object] = lambda error: None,
        note: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.session = session
        self.store = store
        self.model = model
        self._autosave_at_first = autosave
        self._warn = warn
        self._note = note
        self.start_new()

    @property
    def kv_path(self) -> Path:
        return self.store.kv_path(self.chat.id)

    def start_new(self) -> None:
        """Start a new chat. The old one stays as it was saved."""
        started = datetime.now(UTC)
        self.chat = SavedChat(
            id=new_id(started),
            name=None,
            model=self.model,
            identity=self.session.model.identity,
            created=started,
            updated=started,
            system=self.session.system,
            sampling={},
            messages=(),
        )
        self.autosave = self._autosave_at_first
        self.fault: MixchatError | None = None

    def save(self) -> None:
        """Write the chat as it is now, if it is to be saved. Pass an error to `warn`."""
        was_told = self.fault is not None
        try:
            self.save_or_raise()
        except MixchatError as error:
            if not was_told:
                self._warn(error)

    def save_or_raise(self) -> None:
        """Do as `save` does, but raise the `MixchatError`, for scripts, which read no warning."""
        self.fault = None
        if self.autosave and (self.session.history or self.chat.revision):
            try:
                self._save_as(None)
            except MixchatError as error:
                self.fault = error
                raise

    def rename(self, name: str | None) -> None:
        """Save the chat now and from now on, under this name if one is given.

        Raises `UsageError` if the name is taken or cannot be one, and as `ChatStore.save` does.
        """
        self._save_as(name)
        self.autosave = True

    def resume(self, chat: SavedChat, except_for: Collection[str] = ()) -> None:
        """Let the session continue a saved chat with its turns, system prompt and sampling.

        `except_for` names parts of the latter two that stay as they are. An answer by another model
        keeps its text, but not its token ids.
        """
        session = self.session
        same = chat.identity == self.session.model.identity
        messages = chat.messages if same else [replace(m, ids=None) for m in chat.messages]
        session.restore(messages)
        if "system" not in except_for:
            session.system = chat.system
        saved = {name: value for name, value in chat.sampling.items() if name not in except_for}
        session.changed = accepted_numbers(saved)
        self.chat = chat
        self.fault = None
        self.autosave = self._autosave_at_first

    def current(self) -> SavedChat:
        return replace(
            self.chat,
            model=self.model,
            identity=self.session.model.identity,
            updated=datetime.now(UTC),
            system=self.session.system,
            sampling=self.session.sampling,
            messages=tuple(self.session.history),
        )

    def _save_as(self, name: str | None) -> None:
        chat = self.store.save(self.current(), name)
        if self.chat.revision and chat.id != self.chat.id:
            self._note(f"this chat was changed in another session; saved as {chat.id}")
        self.chat = chat
        self.fault = None
