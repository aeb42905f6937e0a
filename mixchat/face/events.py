"""The events of an answer, in order: LeftOut, Reading, Piece, and one End.

If functions run, ToolResult and the events of a further answer come before the End.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from mixchat.engine.stats import GenerationStats

if TYPE_CHECKING:
    from mixchat.text.messages import Message
    from mixchat.text.tool_call import CallDelta, ToolCall

Reason = Literal["stop", "length", "stop_string", "interrupted", "context", "tool_calls"]
COMPLETE = ("stop", "stop_string", "tool_calls")
"""The reasons of answers that lack nothing."""


@dataclass(frozen=True)
class LeftOut:
    """The oldest turns of the conversation that are not in the prompt, because they do not fit.

    messages: how many messages these turns have.
    """

    turns: int
    messages: int

    @classmethod
    def of(cls, messages: Sequence[Message]) -> LeftOut:
        return cls(sum(message.role == "user" for message in messages), len(messages))


@dataclass(frozen=True)
class Reading:
    """The progress of prompt processing, in tokens that were not cached.

    A server tells its progress late or never. Until then, both are 0.
    """

    done: int
    total: int


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log probability before sampling, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer. While a model thinks, there is one for each token.

    calls: pieces of calls of tools. tokens: the tokens since the last piece, if the request asks
    for log probabilities. thinking_tokens: the tokens of thinking so far.
    """

    text: str = ""
    thinking: str = ""
    calls: tuple[CallDelta, ...] = ()
    tokens: tuple[TokenLogprob, ...] = ()
    thinking_tokens: int = 0

    @property
    def is_empty(self) -> bool:
        """Return whether the piece only counts tokens."""
        return not (self.text or self.thinking or self.calls or self.tokens)


@dataclass(frozen=True)
class ToolResult:
    """The event that a call has its result, which may be an error or a refusal."""

    call: ToolCall
    text: str


@dataclass(frozen=True)
class End:
    """The end of an answer.

    stats: its counts and seconds. A stop token counts as generated, and so does thinking. message:
    the whole answer for the next request's messages, which has the answer that was continued, too.
    None if nothing was shown. is_thinking: the text of the answer had not begun.
    """

    reason: Reason
    stats: GenerationStats = field(default_factory=GenerationStats)
    thinking_tokens: int = 0
    seed: int | None = None
    message: Message | None = None
    is_thinking: bool = False


@dataclass(frozen=True)
class Failed:
    """The end of an answer that cannot be given or finished. `Model.ask` raises the error."""

    error: Exception


Event: TypeAlias = "LeftOut | Reading | Piece | ToolResult | End"
