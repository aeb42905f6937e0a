"""Fills a context with random keys and values, to measure what comes behind a long one.

Computing them would take minutes.
"""

from __future__ import annotations

import torch

from mixchat.engine.generate import Engine

_STEP = 2048  # tokens that are stored at once


def hold_random_context(engine: Engine, tokens: int, dtype: torch.dtype) -> None:
    """Let the engine hold so many tokens, each the token 0, and nothing else."""
    _, cache = engine.held()
    config, heads = engine.config, engine.config.num_key_value_heads
    engine.resume([])
    while cache.length < tokens:
        count = min(_STEP, tokens - cache.length)
        numbers = torch.randn(count, 2 * heads, config.head_dim).to(dtype).to(engine.device)
        for layer in range(config.num_hidden_layers):
            cache.store(layer, numbers[:, :heads], numbers[:, heads:])
        engine.resume([0] * (cache.length + count))
