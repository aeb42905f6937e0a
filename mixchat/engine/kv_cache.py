"""The keys and values of the tokens so far, and what all kinds of caches of them have in common.

T = new tokens, P = tokens before them, H = num_attention_heads, G = num_key_value_heads,
h = head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import TensorSpec
from mixchat.engine.chunk_sizer import PREFILL_CHUNK
from mixchat.kernels.cpu.pages import PAGE, Bits

# Tokens before a window that stay, so that the end of a text can be cut off. A pass over a prompt
# needs as much room anyway.
MAX_CUT_TOKENS = PREFILL_CHUNK


class KVCache(ABC):
    """Room for `capacity` tokens of each layer, taken as the cache fills, or at once on a GPU.

    `length` counts the tokens that all layers have stored. An interrupted forward pass leaves it as
    it was.

    A layer with a window W gives whole pages of old tokens back, and keeps W + 2,048. With W = 128
    and 5,000 tokens it keeps those from 2,560 on, so `length` may become 0, or 2,687 and more.
    """

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        self.config, self.capacity, self.length = config, capacity, 0
        self._firsts = [0] * config.num_hidden_layers  # the first tokens that layers keep

    @property
    def first(self) -> int:
        """Return the first token that all layers with a window keep."""
        return max(self._firsts)

    def usable(self, length: int, first: int | None = None) -> int:
        """Return `length`, or 0 if the next token would see a token that layers do not keep.

        first: None for the cache's own.
        """
        first = self.first if first is None else first
        seen = length + 1 - (self.config.sliding_window or 0)
        return length if not first or seen >= first else 0

    def positions(self, tokens: int) -> slice:
        return slice(self.length, self.length + tokens)

    def advance(self, tokens: int) -> None:
        """Count new tokens, after all layers have stored them."""
        self.length += tokens

    def is_like(self, cache: KVCache) -> bool:
        mine, theirs = (self.config, self.capacity), (cache.config, cache.capacity)
        return mine == theirs and self.form == cache.form

    @property
    @abstractmethod
    def form(self) -> str:
        """Return the name of the form. Content fits into caches of the same form."""

    def _start(self, layer: int, first: int) -> int:
        """Return the first token of a layer's content."""
        return 0 if self.config.window(layer) is None else first

    def _check_content(
        self, layer: int, content: dict[str, torch.Tensor], tokens: int, first: int
    ) -> None:
        """Raise `CheckpointError` unless `content` has this cache's form."""
        assert self.length == 0
        forms = {name: (tensor.dtype, tensor.shape) for name, tensor in content.items()}
        specs = self.specs(layer, tokens, first)
        expected = {spec.name: (spec.dtype, spec.shape) for spec in specs}
        if forms != expected or tokens > self.capacity:
            raise CheckpointError(f"the saved part of layer {layer} does not fit this KV cache")

    def _first_to_keep(self, layer: int, tokens: int) -> int:
        """Return a layer's first token, a multiple of `PAGE`, while it gets T new ones.

        The pass may be interrupted, so all that the token after `length` sees is kept, too.
        """
        window = self.config.window(layer)
        if window is None or not self.length:
            return 0
        assert self.usable(self.length)
        oldest = min(self.length + 1, self.length + tokens - MAX_CUT_TOKENS) - window
        # A cache that was restored may lack earlier tokens, whose memory is not taken again.
        return max(self._firsts[layer], oldest // PAGE * PAGE)

    @abstractmethod
    def specs(self, layer: int, tokens: int, first: int) -> list[TensorSpec]:
        """Return the specs of `content` for some tokens, each [G, tokens or more, n].

        Layers with a window have no tokens before `first`.
        """

    @abstractmethod
    def content(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        """Return a copy on the CPU of a layer's first `tokens`, as far as it keeps them."""

    @abstractmethod
    def clear(self) -> None:
        """Empty the cache. All but a GPU's gives its memory back."""

    @abstractmethod
    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [T, G, h] of a layer after the first `length` tokens."""

    @abstractmethod
    def restore(
        self, layer: int, content: dict[str, torch.Tensor], tokens: int, first: int = 0
    ) -> None:
        """Put a layer's first `tokens`, as `content` returns them, into an empty cache.

        first: of the cache that they come from. The caller sets `length` after the last layer.
        Raises `CheckpointError` if the content has another form.
        """

    @abstractmethod
    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store keys and values [T, G, h] of a layer. Return the attention [T, H, h] of queries.

        A token attends to itself and to all before it, or to the last W of these in a layer with a
        window W. `sinks` are logits [H], fp32, of which each joins the sum of a head's softmax.
        """


def layer_room(config: ModelConfig, capacity: int, layer: int) -> int:
    """Return the most tokens that a layer keeps."""
    window = config.window(layer)
    return capacity if window is None else min(capacity, _window_room(window))


def _window_room(window: int) -> int:
    # A page more, because the oldest token that is kept may be the last one of its page.
    return -(-window // PAGE) * PAGE + MAX_CUT_TOKENS + PAGE


def cache_bytes(
    config: ModelConfig, capacity: int, dtype: torch.dtype, bits: Bits | None = None
) -> int:
    """Return the bytes that a full cache takes."""
    most = _window_room(config.sliding_window or 0)
    return _bytes(config, capacity, most, bits or bits_of(dtype))


def bytes_seen(
    config: ModelConfig, tokens: int, dtype: torch.dtype, bits: Bits | None = None
) -> int:
    """Return the bytes of keys and values that a token reads after `tokens` earlier ones."""
    return _bytes(config, tokens, config.sliding_window or 0, bits or bits_of(dtype))


def _bytes(config: ModelConfig, tokens: int, most: int, bits: Bits) -> int:
    """Return the bytes of `tokens`, of which layers with a window have `most`."""
    layers = range(config.num_hidden_layers)
    sliding = sum(config.window(layer) is not None for layer in layers)
    stored = (len(layers) - sliding) * tokens + sliding * min(tokens, most)
    # With 8 bits each key and each value of a group has a scale in fp32.
    size = config.head_dim * bits // 8 + (4 if bits == 8 else 0)
    return 2 * stored * config.num_key_value_heads * size


def bits_of(dtype: torch.dtype) -> Bits:
    """Return the bits of a number in a cache of this type."""
    return 32 if dtype == torch.float32 else 16
