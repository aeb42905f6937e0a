"""The keys and values of the tokens seen so far."""

from __future__ import annotations

import torch

from mixchat.config import ModelConfig


class KVCache:
    """Room for `capacity` tokens: keys and values [layers, kv_heads, capacity, head_dim].

    The room is taken at once but, on a CPU, committed by the system as it fills. `length` counts
    the tokens that all layers have seen; a forward pass that was broken off leaves it as it was.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, heads, capacity, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
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
        self._keys[layer, :, self.length : end] = keys.transpose(0, 1)
        self._values[layer, :, self.length : end] = values.transpose(0, 1)
        return self._keys[layer, :, :end], self._values[layer, :, :end]
