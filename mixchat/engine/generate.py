"""From token ids to token ids: prefill the prompt, then decode one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from mixchat.config import ModelConfig
from mixchat.engine.sampling import SamplingOptions


@dataclass
class GenerationStats:
    """What one call of `Engine.generate` did: counts of tokens, and seconds."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Engine:
    config: ModelConfig
    context_size: int
    stats: GenerationStats

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingOptions,
        stop_ids: Set[int],
        max_tokens: int | None = None,
    ) -> Iterator[int]:
        raise NotImplementedError
