"""Keys and values of a layer in tensors, for torch's attention.

T = new tokens, P = tokens before them, H = num_attention_heads, G = num_key_value_heads,
h = head_dim.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from mixchat.base.safetensors import TensorSpec
from mixchat.engine.caches.kv_cache import KVCache
from mixchat.engine.caches.layer_cache import Extent
from mixchat.kernels.cpu.pages import CacheShape

_GROWTH = 512  # tokens for which tensors get room at once
_INT8_MAX = 127
_SINK_TOKENS = 64  # that torch computes at once
_MASKS = 2  # of a pass, for layers with a window and others


class PlainKVCache(KVCache):
    """The common part of caches of keys and values [G, tokens, h].

    With 8 bits they store a scale for each key and value.
    """

    def __init__(
        self, shape: CacheShape, capacity: int, window: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__(shape, capacity, window)
        self._dtype = dtype
        self._quantized = shape.bits == 8
        self._stored_dtype = torch.int8 if self._quantized else dtype

    @property
    def form(self) -> str:
        return f"{self._dtype} tensors{' in 8 bits' if self._quantized else ''}"

    def specs(self, extent: Extent) -> list[TensorSpec]:
        """Return specs of keys and values [G, tokens, h], and of scales [G, tokens, 1]."""
        shape = self.shape.groups, extent.tokens - self._start(extent)
        columns = {"keys": self.shape.key_dim, "values": self.shape.value_dim}
        specs = [
            TensorSpec(name, self._stored_dtype, (*shape, count)) for name, count in columns.items()
        ]
        if self._quantized:
            scales = ("key_scales", "value_scales")
            specs += [TensorSpec(name, torch.float32, (*shape, 1)) for name in scales]
        return specs


class Masks:
    """The masks of a pass, which all layers with the same window share."""

    def __init__(self) -> None:
        self._masks: dict[tuple[int, int, int | None], torch.Tensor | None] = {}

    def mask(self, past: int, tokens: int, window: int | None) -> torch.Tensor | None:
        """Return `attention_mask`."""
        key = past, tokens, window
        if key not in self._masks:
            if len(self._masks) == _MASKS:
                self._masks.clear()
            self._masks[key] = attention_mask(*key)
        return self._masks[key]


class TensorKVCache(PlainKVCache):
    """A cache for torch's attention on a CPU that has no kernel."""

    def __init__(
        self,
        shape: CacheShape,
        capacity: int,
        window: int | None,
        dtype: torch.dtype,
        masks: Masks,
    ) -> None:
        super().__init__(shape, capacity, window, dtype)
        self._masks = masks
        self.clear()

    def content(self, extent: Extent) -> dict[str, torch.Tensor]:
        kept = slice(self._start(extent), extent.tokens)
        return {name: self._part(name, kept) for name in self._stored}

    def clear(self) -> None:
        self.length = self._first = 0
        # Each tensor has a number, its first token.
        self._stored = {
            spec.name: (0, torch.empty(spec.shape, dtype=spec.dtype))
            for spec in self.specs(Extent())
        }

    def _restore(self, content: dict[str, torch.Tensor], extent: Extent, length: int) -> None:
        self._first = start = self._start(extent)
        for name, tensor in content.items():
            # A copy, because the content may be a view of a saved file's longer tensor.
            self._stored[name] = start, tensor[:, : length - start].clone()

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for name, new in (("key", keys), ("value", values)):
            numbers = new.transpose(0, 1)  # [G, T, h]
            if self._quantized:
                numbers, scales = in_8_bits(numbers)
                self._put(f"{name}_scales", scales)
            self._put(f"{name}s", numbers)

    def _put(self, name: str, new: torch.Tensor) -> None:
        """Store [G, T, n] after the first `length` tokens."""
        (first, old), past = self._stored[name], self.length
        end = past + new.shape[1]
        if end - first > old.shape[1] or past < first:
            kept = self._first_to_keep(new.shape[1])
            room = min(-(-end // _GROWTH) * _GROWTH, self.capacity) - kept
            grown = old.new_empty(old.shape[0], room, old.shape[2])
            if past:
                grown[:, : past - kept] = old[:, kept - first : past - first]
            self._stored[name] = first, old = kept, grown
            self._first = kept
        old[:, past - first : end - first] = new

    def _part(self, name: str, tokens: slice) -> torch.Tensor:
        """Return a view of keys, values or scales of some tokens [G, tokens, n]."""
        first, stored = self._stored[name]
        return stored[:, tokens.start - first : tokens.stop - first]

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tokens, heads, _ = queries.shape
        groups = self.shape.groups
        shared = self.shape.shared
        assert self.length + tokens <= self.capacity
        self.store(keys, values)
        # The first token that the first query sees.
        start = 0 if self.window is None else max(0, self.length + 1 - self.window)
        seen = slice(start, self.length + tokens)
        keys, values = (self._part(name, seen) for name in ("keys", "values"))
        if self._quantized:
            keys = (keys * self._part("key_scales", seen)).to(self._dtype)
            values = (values * self._part("value_scales", seen)).to(self._dtype)
        if self.shape.latent_dim:
            keys = torch.cat([values, keys], dim=-1)
        mask = self._masks.mask(self.length - start, tokens, self.window)
        # The R = H / G heads that share a key are joined like R times as many tokens. `enable_gqa`
        # would read each key R times.
        grouped = queries.reshape(tokens, groups, shared, -1).permute(1, 2, 0, 3)  # [G, R, T, h]
        if sinks is None:
            attended = functional.scaled_dot_product_attention(
                grouped.reshape(1, groups, shared * tokens, -1),  # [1, G, R * T, h]
                keys[None],
                values[None],
                attn_mask=None if mask is None else mask.repeat(shared, 1),  # [R * T, P + T]
                scale=self.shape.score_scale,
            )
        else:
            attended = _attention_with_sinks(
                grouped, keys, values, mask, sinks, self.shape.score_scale
            )
        merged = attended.view(groups, shared, tokens, -1).permute(2, 0, 1, 3)  # [T, G, R, h]
        return merged.reshape(tokens, heads, -1)


def in_8_bits(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return numbers [G, T, h] as whole ones from -127 to 127, and their scales [G, T, 1]."""
    scales = numbers.float().abs().amax(-1, keepdim=True) / _INT8_MAX
    # A key of zeros has a scale of 0, and stays zeros.
    return (numbers.float() / scales.clamp(min=1e-30)).round(), scales


def _attention_with_sinks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return the attention [G, R, T, h] of queries over keys and values [G, P + T, h].

    torch's own attention has no sinks.
    """
    groups, shared, tokens, _ = queries.shape
    attended = []
    # Scores take 4 bytes for each head and pair of tokens.
    for start in range(0, tokens, _SINK_TOKENS):
        chunk = slice(start, start + _SINK_TOKENS)
        scores = queries[:, :, chunk] @ keys.mT[:, None] * scale  # [G, R, t, P + T]
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
