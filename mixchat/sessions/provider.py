"""The contract of the models of `mixchat run`, on this machine or a server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from mixchat.base.model_config import Context

if TYPE_CHECKING:
    from mixchat.base.options import ChatOptions
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession
    from mixchat.chat.terminal.active_chat import ChatCache
    from mixchat.planning.plan import Prediction
    from mixchat.serving.requests.lines import Begin

Predictor = Callable[[], "Prediction | None"]  # of a loaded model's speed, None if unknown


class ModelProvider(Protocol):
    """Models, and sessions with them."""

    @property
    def place(self) -> str:
        """Return the place as a chat names it, such as `on this machine`."""

    def choose(self, given: str | None, resumed: SavedChat | None) -> str:
        """Return the given model, else the resumed chat's if it is there, else the usual one.

        Raises `ModelNotFoundError` if there is none.
        """

    def context_of(self, name: str) -> Context:
        """Return a model's context."""

    def open(
        self, name: str, options: ChatOptions, resumed: SavedChat | None = None
    ) -> ChatSession:
        """Return a session with a model, whose context holds the `resumed` chat if possible."""

    def lines(
        self, name: str, options: ChatOptions, parallel: int
    ) -> AbstractContextManager[tuple[Begin, Context]]:
        """Load a model. Yield the function that begins a line's answer, and the model's context."""

    def predictor(self, session: ChatSession, name: str) -> Predictor:
        """Return a function that predicts the speed of the session's model."""

    def cache(self, saver: ChatSaver, *, asks_once: bool) -> AbstractContextManager[ChatCache]:
        """Return the keeper of the KV cache while the chat is open."""

    def others(self, current: str) -> list[str]:
        """Return the names of the other models. It is called while a name is typed."""

    def check(self, name: str, current: str) -> None:
        """Raise `MixchatError` if a chat cannot change its model."""
