"""The counts of one answer. This file imports no torch, for chats with a server."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixchat.experts.cache import ExpertStats


@dataclass
class SpeculationStats:
    """Counts of proposed tokens.

    passes: that verified proposals. single_seconds: the mean of passes of one token.
    """

    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    single_seconds: float = 0.0


@dataclass
class GenerationStats:
    """Counts of tokens, seconds, and uses of experts.

    repeated_tokens: of the prompt, that the cache held but could not be cut to.
    prefill_waiting_seconds: the part of prefill_seconds in which experts were on their way.
    prefill_bytes_read: from the disk until the first token.
    If a server answers, the seconds are measured here, and the experts have no counts.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    repeated_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    prefill_waiting_seconds: float = 0.0
    prefill_bytes_read: int = 0
    decode_seconds: float = 0.0
    experts: ExpertStats = field(default_factory=ExpertStats, repr=False)
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
