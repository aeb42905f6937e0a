"""Estimates how long a prompt takes to be read, before it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixchat.engine.stats import GenerationStats

# The seconds that so many tokens are predicted to take, in the first turn or later; None where
# nothing is known.
Predict = Callable[[int, bool], float | None]
_ENOUGH = 64  # tokens of a prompt whose pace says something of longer ones


class ReadingTime:
    """Knows it by this session's own pace, and before that by what is predicted."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self._pace: float | None = None  # seconds a token
        self._first = True

    def note(self, stats: GenerationStats) -> None:
        """Learn from a turn that has ended."""
        self._first = False
        tokens = stats.prompt_tokens - stats.reused_tokens
        if tokens >= _ENOUGH and stats.prefill_seconds > 0:
            self._pace = stats.prefill_seconds / tokens

    def seconds(self, tokens: int) -> float | None:
        """Return the seconds that so many tokens will take."""
        if self._pace is not None:
            return tokens * self._pace
        return self._predict(tokens, self._first)
