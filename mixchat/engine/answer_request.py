"""What the answer loop is asked. This file imports no torch, for those who only ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mixchat.base.options import SamplingOptions

if TYPE_CHECKING:
    from mixchat.engine.sampling import Constraint

EndReason = Literal["stop", "length", "context"]
OnPrefill = Callable[[int, int], object]  # is called with the tokens done, and their total


@dataclass(frozen=True)
class AnswerRequest:
    """A prompt and how to answer it.

    max_tokens: that fit, too. at_max: why an answer of so many tokens ends. on_prefill: is called
    after layers.
    """

    ids: Sequence[int]
    sampling: SamplingOptions
    stop_ids: Set[int]
    max_tokens: int
    constraint: Constraint | None = None
    on_prefill: OnPrefill = lambda done, total: None
    at_max: Literal["length", "context"] = "length"

    def end_after(self, tokens: int, last: int) -> EndReason | None:
        """Return why an answer of so many tokens ends with the last one, None if it does not."""
        if last in self.stop_ids:
            return "stop"
        return self.at_max if tokens >= self.max_tokens else None
