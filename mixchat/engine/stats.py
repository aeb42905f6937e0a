"""Counts of one answer: of tokens, seconds, uses of experts, and proposed tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixchat.experts.cache import ExpertStats


@dataclass
class SpeculationStats:
    """Counts of one answer.

    passes: those that verified proposals; proposed, accepted: the tokens in them; single_seconds:
    the mean of passes of one token.
    """

    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    single_seconds: float = 0.0


@dataclass
class GenerationStats:
    """Counts of one answer: of tokens, seconds, and uses of experts.

    Of an answer that a server gives, the seconds are those that passed here; `prompt_tokens` is 0
    until the server has told it, and the experts have no counts.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    experts: ExpertStats = field(default_factory=ExpertStats)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
