"""The time to read a prompt, by this session's pace, or else by the prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from mixchat.engine.generate import Engine
    from mixchat.engine.stats import GenerationStats
    from mixchat.planning.expectation import SpeedEstimate

Predictor: TypeAlias = "Callable[[], SpeedEstimate | None]"
"""Predicts a loaded model's speed. Returns None if nothing was measured on this machine."""
_MIN_TIMED_PROMPT = 64  # tokens, or the pace says nothing about longer prompts


class ReadingTime:
    """Estimates the time to read a prompt with an engine. Without one, its pace alone counts."""

    def __init__(self, predictor: Predictor = lambda: None, engine: Engine | None = None) -> None:
        self._predictor = predictor
        self._engine = engine
        self._pace: float | None = None  # seconds a token
        self._is_first = True

    def note(self, stats: GenerationStats) -> None:
        """Learn from a turn that has ended."""
        self._is_first = False
        tokens = stats.prompt_tokens - stats.reused_tokens
        if tokens >= _MIN_TIMED_PROMPT and stats.prefill_seconds > 0:
            self._pace = stats.prefill_seconds / tokens

    def seconds(self, tokens: int) -> float | None:
        """Return the seconds that so many tokens will take, None if that is not known."""
        if self._pace is not None:
            return tokens * self._pace
        prediction = self._predictor()
        engine = self._engine
        if prediction is None:
            return None
        # If all experts fit, they come before anyone asks.
        fit = engine is not None and engine.experts.slots >= engine.blueprint.expert_count
        cold = self._is_first and (engine is None or not fit or engine.experts.is_filling)
        cost = prediction.prompt(tokens, cold=cold)
        return None if cost is None else cost.seconds
