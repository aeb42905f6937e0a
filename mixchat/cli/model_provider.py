"""The contract of the place whose models answer in `mixchat run`: this machine, or a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mixchat.base.model_config import Context

if TYPE_CHECKING:
    from mixchat.chat.backend import Overflow
    from mixchat.chat.saved.chat_file import SavedChat
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession
    from mixchat.chat.terminal.active_chat import AfterTurn, ChatCache, ChatModels, Predict
    from mixchat.planning.plan import Prediction
    from mixchat.serving.requests.lines import Begin


@dataclass(frozen=True)
class LineRequest:
    """The file to answer, `-` for standard input, and what applies where a line says nothing.

    resume_from: the file that gets the answers, and may have some; None for standard output.
    keep_failed: do not try again the lines that failed in it. parallel: answers at once.
    """

    source: str
    resume_from: Path | None
    keep_failed: bool
    parallel: int
    sampling: Mapping[str, float | None]
    system: str | None
    max_tokens: int | None
    stop: Sequence[str]


class ModelProvider(Protocol):
    """Models, and sessions with them: `LocalModels` and `ServerModels`."""

    def choose(self, given: str | None, resumed: SavedChat | None) -> str:
        """Return the model that was given, else that of the chat if it is there, else the usual
        one. Raises `ModelNotFoundError` where there is none."""

    def context_of(self, name: str) -> Context:
        """Return the context that a model will have."""

    def open(
        self,
        name: str,
        *,
        sampling: Mapping[str, float | None],
        system: str | None,
        max_tokens: int | None,
        stop: Sequence[str],
        overflow: Overflow,
    ) -> ChatSession:
        """Return a session with a model."""

    def lines(
        self, model: str, request: LineRequest
    ) -> AbstractContextManager[tuple[Begin, Context]]:
        """Load a model, and return what begins the answer of a line, and the model's context."""

    def predictor(self, session: ChatSession, name: str) -> Callable[[], Prediction | None]:
        """Return a function that predicts how fast the session's model is; None if unknown."""

    def cache(self, saver: ChatSaver, *, asks_once: bool) -> AbstractContextManager[ChatCache]:
        """Return the keeper of the KV cache, for as long as the chat is open."""

    def changer(
        self,
        saver: ChatSaver,
        open_model: Callable[[str], ChatSession],
        hooks: Callable[[str], tuple[AfterTurn, Predict]],
    ) -> ChatModels:
        """Return what changes the model of a chat.

        `open_model` returns a session with a model, `hooks` its `after_turn` and `predict`.
        """
