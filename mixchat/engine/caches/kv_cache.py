"""Keys and values of a layer, and what all kinds of caches of them have in common.

T = new tokens, P = tokens before them, H = num_attention_heads, G = num_key_value_heads,
h = head_dim.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from mixchat.engine.caches.layer_cache import Extent, LayerCache
from mixchat.kernels.cpu.pages import PAGE, CacheShape

# Tokens before a window that stay, so that the end of a text can be cut off. A pass over a prompt
# needs as much room anyway, and has no more tokens.
MAX_CUT_TOKENS = 2048


class KVCache(LayerCache):
    """Room for `capacity` tokens of a layer, taken as the cache fills, or at once on a GPU.

    A layer with a window W gives whole pages of old tokens back, and keeps W + 2,048. With W = 128
    and 5,000 tokens it keeps those from 2,560 on, so it may be cut to none, or to 2,687 and more.
    """

    def __init__(self, shape: CacheShape, capacity: int, window: int | None) -> None:
        super().__init__()
        self.shape = shape
        self.capacity = capacity
        self.window = window
        self._first = 0

    @property
    def first(self) -> int:
        return self._first

    def usable(self, length: int, extent: Extent) -> int:
        # Nothing is usable if the next token would see a token that the layer does not keep.
        if self.window is None or not extent.first:
            return length
        return length if length + 1 - self.window >= extent.first else 0

    def _start(self, extent: Extent) -> int:
        """Return the first token of the layer's content."""
        return 0 if self.window is None else extent.first

    def _first_to_keep(self, tokens: int) -> int:
        """Return the first token, a multiple of `PAGE`, that stays while T new ones come.

        The pass may be interrupted, so all that the token after `length` sees is kept, too.
        """
        if self.window is None or not self.length:
            return 0
        assert self.length + 1 - self.window >= self._first or not self._first
        oldest = min(self.length + 1, self.length + tokens - MAX_CUT_TOKENS) - self.window
        # A cache that was restored may lack earlier tokens, whose memory is not taken again.
        return max(self._first, oldest // PAGE * PAGE)

    def fill(self, tokens: int, dtype: torch.dtype) -> None:
        shape = self.shape
        keys, values = (
            torch.randn(tokens, shape.groups, columns, device=self.device).to(dtype)
            for columns in (shape.key_dim, shape.value_dim)
        )
        self.store(keys, values)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @abstractmethod
    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [T, G, h] after the first `length` tokens."""

    @abstractmethod
    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store keys and values [T, G, h]. Return the attention [T, H, h] of queries.

        If the cache holds latents, these are values [T, 1, v], and keys are their other numbers.
        Queries [T, H, h] have the columns of values first. Then the attention is [T, H, v].

        A token attends to itself and to all before it, or to the last W of these in a layer with a
        window W. `sinks` are logits [H], fp32, of which each joins the sum of a head's softmax.
        """


def room_of(capacity: int, window: int | None) -> int:
    """Return the most tokens that a layer keeps."""
    if window is None:
        return capacity
    # A page more, because the oldest token that is kept may be the last one of its page.
    return min(capacity, -(-window // PAGE) * PAGE + MAX_CUT_TOKENS + PAGE)


def token_bytes(shape: CacheShape) -> int:
    """Return the bytes of a token's keys and values, without padding."""
    # With 8 bits each key and each value of a group has a scale in fp32.
    scales = 8 if shape.bits == 8 else 0
    return shape.groups * ((shape.key_dim + shape.value_dim) * shape.bits // 8 + scales)
