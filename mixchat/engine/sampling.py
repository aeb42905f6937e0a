"""Choosing the next token from the logits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and
    `repeat_penalty` 1 switch that filter off; `seed` None draws one."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
