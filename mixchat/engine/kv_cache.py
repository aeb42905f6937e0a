"""The keys and values of the tokens seen so far."""

from __future__ import annotations

import torch

from mixchat.config import ModelConfig

_STEP = 512  # tokens


class KVCache:
    """Room for `capacity` tokens: of each layer keys and values, [kv_heads, tokens, head_dim].

    Memory is taken as the cache fills, `_STEP` tokens at a time, so that a short conversation
    leaves it to the experts. `length` counts the tokens that all layers have seen; a forward pass
    that was broken off leaves it as it was.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_key_value_heads, 0, config.head_dim)
        empty = torch.empty(shape, dtype=dtype, device=device)
        self._keys = [empty] * config.num_hidden_layers
        self._values = [empty] * config.num_hidden_layers
        self.capacity = capacity
        self.length = 0

    @staticmethod
    def nbytes(config: ModelConfig, capacity: int, dtype: torch.dtype) -> int:
        """Bytes that a cache of this capacity takes when it is full."""
        width = config.num_key_value_heads * config.head_dim * dtype.itemsize
        return 2 * config.num_hidden_layers * capacity * width

    def store(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put [T, kv_heads, head_dim] of one layer behind `length`; all of that layer's so far,
        as [kv_heads, length + T, head_dim]."""
        end = self.length + keys.shape[0]
        assert end <= self.capacity
        # The values grow last: broken off in between, by Ctrl-C or for want of memory, both are
        # grown again.
        if end > self._values[layer].shape[1]:
            self._keys[layer] = self._grown(self._keys[layer], end)
            self._values[layer] = self._grown(self._values[layer], end)
        self._keys[layer][:, self.length : end] = keys.transpose(0, 1)
        self._values[layer][:, self.length : end] = values.transpose(0, 1)
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def _grown(self, old: torch.Tensor, tokens: int) -> torch.Tensor:
        """The same with room for `tokens` at least."""
        room = min(-(-tokens // _STEP) * _STEP, self.capacity)
        grown = old.new_empty(old.shape[0], room, old.shape[2])
        grown[:, : self.length] = old[:, : self.length]
        return grown
