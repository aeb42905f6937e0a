"""The KV caches of several sequences, whose next tokens are computed in one pass.

T = tokens of the pass, H = num_attention_heads, G = num_key_value_heads, h = head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixchat.engine.kv_cache import KVCache


class CacheBatch:
    """Caches with the count of new tokens of each: `KVContext` for their rows, in this order.

    Attention is computed for one sequence after the other, everything else for all rows at once.
    With 5 and 7 tokens before, and 1 and 2 new ones, the positions are 5, 7, 8.
    """

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int], device: torch.device):
        self._caches, self._counts = caches, list(counts)
        positions = [
            torch.arange(cache.length, cache.length + count)
            for cache, count in zip(caches, counts, strict=True)
        ]
        self._positions = torch.cat(positions).to(device)

    def positions(self, tokens: int) -> torch.Tensor:
        """Return the positions [T] of the next tokens in their sequences."""
        assert tokens == self._positions.shape[0]
        return self._positions

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Store keys and values [T, G, h]; return the attention [T, H, h] of queries."""
        pieces = (torch.split(rows, self._counts) for rows in (queries, keys, values))
        return torch.cat(
            [cache.attend(layer, *rows) for cache, *rows in zip(self._caches, *pieces, strict=True)]
        )

    def advance(self, tokens: int) -> None:
        """Count the new tokens in each cache."""
        for cache, count in zip(self._caches, self._counts, strict=True):
            cache.advance(count)
