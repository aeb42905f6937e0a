"""The contract between a conversation and its backend, which is an engine here, or a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mixchat.chat.answer import Reason
from mixchat.text.messages import Message

if TYPE_CHECKING:
    from mixchat.base.model_config import Context
    from mixchat.base.options import Overflow, RequestedSampling, SamplingOptions
    from mixchat.engine.generate import Engine
    from mixchat.engine.stats import GenerationStats
    from mixchat.text.thinking import AnswerText

# Is called with the tokens of the prompt that are processed, and with their total. Both are 0 if a
# server does not tell them, or has not yet.
OnPrefill = Callable[[int, int], object]
LEAVE_OUT_HINT = (
    "The oldest turns can be left out: --overflow drop-oldest, or in a chat /set overflow "
    "drop-oldest; /clear starts a new chat."
)


@dataclass(frozen=True)
class Turn:
    """A conversation whose last message is to be answered, and the options of the answer.

    system: the system prompt, if there is one. first: the first message that is in the prompt,
    since earlier turns left the others out. before: the answer that is to be continued. max_tokens:
    see `ChatOptions`. may_think: False turns thinking off if the model can do without.
    """

    system: Sequence[Message]
    messages: Sequence[Message]
    first: int
    before: Message | None
    sampling: SamplingOptions | RequestedSampling
    max_tokens: int | None
    stop: tuple[str, ...]
    overflow: Overflow
    may_think: bool = True

    def questions_after_first(self) -> list[int]:
        """Return the messages from which the prompt may begin, if more turns are left out."""
        messages = enumerate(self.messages)
        return [i for i, message in messages if i > self.first and message.role == "user"]


class Reply(Protocol):
    """An answer while it is made. first: the first message that is in the prompt."""

    @property
    def first(self) -> int: ...

    @property
    def reason(self) -> Reason: ...

    def texts(self) -> Iterator[AnswerText]:
        """Yield the text that each token adds, which may be empty. Then `reason` is known."""

    def message(self) -> Message | None:
        """Return the message to remember, joined to the answer before, None if it shows no more."""

    def close(self) -> None:
        """End the answer, if it has not ended."""


class Backend(Protocol):
    """A model that answers. engine: None if a server runs the model.

    identity: differs if the weights do. context: None if its size is not known. stats: the counts
    of the last answer, as far as it has come.
    """

    @property
    def identity(self) -> str: ...

    @property
    def engine(self) -> Engine | None: ...

    @property
    def context(self) -> Context | None: ...

    @property
    def stats(self) -> GenerationStats: ...

    @property
    def can_skip_thinking(self) -> bool:
        """Return whether `Turn.may_think` has an effect."""

    def about(self) -> dict[str, str]:
        """Return facts of the model for a person, by label."""

    def longest_answer(self, max_tokens: int | None) -> int | None:
        """Return how many tokens an answer may have, None for what fits, or a server allows."""

    def used_tokens(self, messages: Sequence[Message]) -> int | None:
        """Return how many tokens a conversation takes, None if that is not known."""

    def reply(self, turn: Turn, on_prefill: OnPrefill) -> Reply:
        """Begin an answer.

        Raises `PromptTooLongError` if the prompt does not fit the context, even without the turns
        that may be left out.
        """
