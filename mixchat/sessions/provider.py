"""The contract of the models that answer in `mixchat run`, on this machine or a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mixchat.base.model_config import Context

if TYPE_CHECKING:
    from mixchat.chat.backend import Overflow
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession
    from mixchat.chat.terminal.active_chat import ChatCache
    from mixchat.planning.plan import Prediction
    from mixchat.serving.requests.lines import Begin

Predictor = Callable[[], "Prediction | None"]  # of a loaded model's speed, None if unknown


@dataclass(frozen=True)
class ChatOptions:
    """The options of all answers of a run. None leaves one to the model or the server.

    `sampling` has the numbers of `SAMPLING`, by their names in Python.
    """

    sampling: Mapping[str, float | None]
    system: str | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    overflow: Overflow = "stop"


class ModelProvider(Protocol):
    """Models, and sessions with them, as `LocalModels` and `ServerModels` have them."""

    @property
    def place(self) -> str:
        """Return the place of the models as a chat names it, such as `on this machine`."""

    def choose(self, given: str | None, resumed: SavedChat | None) -> str:
        """Return the given model, else the resumed chat's if it is there, else the usual one.

        Raises `ModelNotFoundError` if there is none.
        """

    def context_of(self, name: str) -> Context:
        """Return the context that a model will have."""

    def open(self, name: str, options: ChatOptions) -> ChatSession:
        """Return a session with a model."""

    def lines(
        self, name: str, options: ChatOptions, parallel: int
    ) -> AbstractContextManager[tuple[Begin, Context]]:
        """Load a model. Yield the function that begins a line's answer, and the model's context."""

    def predictor(self, session: ChatSession, name: str) -> Predictor:
        """Return a function that predicts how fast the session's model is."""

    def cache(self, saver: ChatSaver, *, asks_once: bool) -> AbstractContextManager[ChatCache]:
        """Return the keeper of the KV cache while the chat is open."""

    def others(self, current: str) -> list[str]:
        """Return the names of the other models. It is called while a name is typed."""

    def check(self, name: str, current: str) -> None:
        """Raise `MixchatError` if a chat cannot change from one model to another."""
