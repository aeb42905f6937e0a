"""A KV cache in tensors, for torch's attention.

T = new tokens, P = tokens before them, H = num_attention_heads, G = num_key_value_heads,
h = head_dim.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import TensorSpec
from mixchat.engine.kv_cache import KVCache

_GROWTH = 512  # tokens for which tensors get room at once
_INT8_MAX = 127
_SINK_TOKENS = 64  # that torch computes at once
_MASKS = 2  # of a pass, for layers with a window and others


class PlainKVCache(KVCache):
    """The common part of caches of keys and values [G, tokens, h].

    With `quantized` they store 8 bits a number and a scale for each key and value.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, *, quantized: bool = False
    ) -> None:
        super().__init__(config, capacity)
        self._dtype, self._quantized = dtype, quantized
        self._stored_dtype = torch.int8 if quantized else dtype

    @property
    def form(self) -> str:
        return f"{self._dtype} tensors{' in 8 bits' if self._quantized else ''}"

    def specs(self, layer: int, tokens: int, first: int) -> list[TensorSpec]:
        """Return specs of keys and values [G, tokens, h], and of scales [G, tokens, 1]."""
        tokens -= self._start(layer, first)
        groups, shape = self.config.num_key_value_heads, (tokens, self.config.head_dim)
        names = ("keys", "values")
        specs = [TensorSpec(name, self._stored_dtype, (groups, *shape)) for name in names]
        if self._quantized:
            scales = ("key_scales", "value_scales")
            specs += [TensorSpec(name, torch.float32, (groups, tokens, 1)) for name in scales]
        return specs


class TensorKVCache(PlainKVCache):
    """A cache for torch's attention on a CPU that has no kernel.

    Each tensor has a number, its first token.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, *, quantized: bool = False
    ) -> None:
        super().__init__(config, capacity, dtype, quantized=quantized)
        self._masks: dict[tuple[int, int, int | None], torch.Tensor | None] = {}
        self.clear()

    def content(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        kept = slice(self._start(layer, self.first), tokens)
        return {name: self._part(name, layer, kept) for name in self._stored}

    def clear(self) -> None:
        self.length = 0
        layers = self.config.num_hidden_layers
        self._firsts = [0] * layers
        self._stored = {  # of each layer
            spec.name: [(0, torch.empty(spec.shape, dtype=spec.dtype))] * layers
            for spec in self.specs(0, 0, 0)
        }

    def restore(
        self, layer: int, content: dict[str, torch.Tensor], tokens: int, first: int = 0
    ) -> None:
        self._check_content(layer, content, tokens, first)
        self._firsts[layer] = start = self._start(layer, first)
        for name, tensor in content.items():
            # A copy, because the content may be a view of a saved file's longer tensor.
            self._stored[name][layer] = start, tensor.clone()

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        for name, new in (("key", keys), ("value", values)):
            numbers = new.transpose(0, 1)  # [G, T, h]
            if self._quantized:
                scales = numbers.float().abs().amax(-1, keepdim=True) / _INT8_MAX
                # A key of zeros has a scale of 0, and stays zeros.
                numbers = (numbers.float() / scales.clamp(min=1e-30)).round()
                self._put(f"{name}_scales", layer, scales)
            self._put(f"{name}s", layer, numbers)

    def _put(self, name: str, layer: int, new: torch.Tensor) -> None:
        """Store [G, T, n] after the first `length` tokens."""
        (first, old), past = self._stored[name][layer], self.length
        end = past + new.shape[1]
        if end - first > old.shape[1] or past < first:
            kept = self._first_to_keep(layer, new.shape[1])
            room = min(-(-end // _GROWTH) * _GROWTH, self.capacity) - kept
            grown = old.new_empty(old.shape[0], room, old.shape[2])
            if past:
                grown[:, : past - kept] = old[:, kept - first : past - first]
            self._stored[name][layer] = first, old = kept, grown
            self._firsts[layer] = kept
        old[:, past - first : end - first] = new

    def _part(self, name: str, layer: int, tokens: slice) -> torch.Tensor:
        """Return a view of keys, values or scales of some tokens [G, tokens, n]."""
        first, stored = self._stored[name][layer]
        return stored[:, tokens.start - first : tokens.stop - first]

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tokens, heads, _ = queries.shape
        groups = self.config.num_key_value_heads
        shared, window = heads // groups, self.config.window(layer)
        assert self.length + tokens <= self.capacity
        self.store(layer, keys, values)
        # The first token that the first query sees.
        start = 0 if window is None else max(0, self.length + 1 - window)
        seen = slice(start, self.length + tokens)
        keys, values = (self._part(name, layer, seen) for name in ("keys", "values"))
        if self._quantized:
            keys = (keys * self._part("key_scales", layer, seen)).to(self._dtype)
            values = (values * self._part("value_scales", layer, seen)).to(self._dtype)
        # All layers of a pass with the same window share a mask.
        pass_key = self.length - start, tokens, window
        if pass_key not in self._masks:
            if len(self._masks) == _MASKS:
                self._masks.clear()
            self._masks[pass_key] = attention_mask(*pass_key)
        mask = self._masks[pass_key]
        # The R = H / G heads that share a key are joined like R times as many tokens. `enable_gqa`
        # would read each key R times.
        grouped = queries.reshape(tokens, groups, shared, -1).permute(1, 2, 0, 3)  # [G, R, T, h]
        if sinks is None:
            attended = functional.scaled_dot_product_attention(
                grouped.reshape(1, groups, shared * tokens, -1),  # [1, G, R * T, h]
                keys[None],
                values[None],
                attn_mask=None if mask is None else mask.repeat(shared, 1),  # [R * T, P + T]
            )
        else:
            attended = _attention_with_sinks(grouped, keys, values, mask, sinks)
        merged = attended.view(groups, shared, tokens, -1).permute(2, 0, 1, 3)  # [T, G, R, h]
        return merged.reshape(tokens, heads, -1)


def _attention_with_sinks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Return the attention [G, R, T, h] of queries over keys and values [G, P + T, h].

    torch's own attention has no sinks.
    """
    groups, shared, tokens, width = queries.shape
    attended = []
    # Scores take 4 bytes for each head and pair of tokens.
    for start in range(0, tokens, _SINK_TOKENS):
        chunk = slice(start, start + _SINK_TOKENS)
        scores = queries[:, :, chunk] @ keys.mT[:, None] * width**-0.5  # [G, R, t, P + T]
        if mask is not None:
            scores = scores.masked_fill(~mask[chunk], -torch.inf)
        # A sink takes a share of the softmax, but has no value to add.
        sink = sinks.view(groups, shared, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        attended.append(weights.to(values.dtype) @ values[:, None])
    return torch.cat(attended, dim=2)


def attention_mask(past: int, tokens: int, window: int | None) -> torch.Tensor | None:
    """Return which of P + T keys each of T queries may see [T, P + T], or None for all keys.

    Past 1, tokens 2 and window 2 give [[1, 1, 0], [0, 1, 1]].
    """
    sees_all = window is None or past + tokens <= window
    if tokens == 1 and sees_all:
        return None
    query = torch.arange(past, past + tokens)[:, None]
    key = torch.arange(past + tokens)[None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)
