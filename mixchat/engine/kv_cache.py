"""The keys and values of the tokens so far, and the attention of new tokens to them.

T = new tokens, P = tokens before them, H = num_attention_heads, G = num_key_value_heads,
h = head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch.nn import functional

from mixchat.base import interrupts
from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import TensorSpec
from mixchat.kernels import attention, pages
from mixchat.kernels.compile import kernels_available
from mixchat.kernels.pages import KEY_BLOCK, PAGE, Bits, CacheShape
from mixchat.kernels.program import Step

_GROWTH = 512  # tokens for which tensors get room at once
_INT8_MAX = 127
# Of a call to the kernel. Pairs are of a new token and one that it may see.
_MAX_PAIRS_PER_CALL, _MIN_TOKENS_PER_CALL = 2**22, 64
_SINK_TOKENS = 64  # that torch computes at once
_MASKS = 2  # of a pass, for layers with a window and others


class KVCache(ABC):
    """Room for `capacity` tokens of each layer, taken as the cache fills.

    `length` counts the tokens that all layers have stored. An interrupted forward pass leaves it as
    it was.
    """

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        self.config, self.capacity, self.length = config, capacity, 0

    def positions(self, tokens: int) -> slice:
        return slice(self.length, self.length + tokens)

    def advance(self, tokens: int) -> None:
        """Count so many new tokens, after all layers have stored them."""
        self.length += tokens

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
        assert self.length + keys.shape[0] <= self.capacity
        self.store(layer, keys, values)
        return self._attend(layer, queries, sinks)

    def restore(self, layer: int, content: dict[str, torch.Tensor], tokens: int) -> None:
        """Put a layer's first `tokens`, as `content` returns them, into an empty cache.

        The caller sets `length` after the last layer. Raises `CheckpointError` if the content has
        another form.
        """
        assert self.length == 0
        given = {name: (tensor.dtype, tensor.shape) for name, tensor in content.items()}
        expected = {spec.name: (spec.dtype, spec.shape) for spec in self.specs(tokens)}
        if given != expected or tokens > self.capacity:
            raise CheckpointError(f"the saved part of layer {layer} does not fit this KV cache")
        self._restore(layer, content, tokens)

    def is_like(self, other: KVCache) -> bool:
        mine, theirs = (self.config, self.capacity), (other.config, other.capacity)
        return mine == theirs and self.form == other.form

    @property
    @abstractmethod
    def form(self) -> str:
        """Return the name of the form. Content fits into caches of the same form."""

    @abstractmethod
    def specs(self, tokens: int) -> list[TensorSpec]:
        """Return the specs of `content` for so many tokens, each [G, tokens or more, n]."""

    @abstractmethod
    def content(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        """Return a copy of a layer's first `tokens`, on the CPU."""

    @abstractmethod
    def clear(self) -> None:
        """Empty the cache, and give its memory back."""

    @abstractmethod
    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [T, G, h] of a layer after the first `length` tokens."""

    @abstractmethod
    def _restore(self, layer: int, content: dict[str, torch.Tensor], tokens: int) -> None: ...

    @abstractmethod
    def _attend(
        self, layer: int, queries: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor: ...


def new_cache(
    config: ModelConfig,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device,
    bits: Bits | None = None,
) -> KVCache:
    """Return the fastest kind of cache on the device. bits: None for the bits of `dtype`."""
    if device.type == "cpu" and dtype != torch.float16 and kernels_available():
        return PagedKVCache(config, capacity, bits or _bits(dtype))
    return TensorKVCache(config, capacity, dtype, device, quantized=bits == 8)


def cache_bytes(
    config: ModelConfig, capacity: int, dtype: torch.dtype, bits: Bits | None = None
) -> int:
    """Return the bytes that a full cache takes."""
    bits = bits or _bits(dtype)
    size = config.head_dim * bits // 8 + (4 if bits == 8 else 0)
    return 2 * config.num_hidden_layers * capacity * config.num_key_value_heads * size


def _bits(dtype: torch.dtype) -> Bits:
    return 32 if dtype == torch.float32 else 16


class PagedKVCache(KVCache):
    """A cache for the CPU's kernel, in pages of 512 tokens, which never move."""

    def __init__(self, config: ModelConfig, capacity: int, bits: Bits) -> None:
        super().__init__(config, capacity)
        self._shape = CacheShape(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, bits
        )
        row, scales = self._shape.width * bits // 8, self._shape.scales_at
        # The start in a group's part of a page, and the bytes of one token.
        self._parts = {"keys": (0, row), "values": (self._shape.values_at, row)}
        if bits == 8:
            self._parts |= {"key_scales": (scales, 4), "value_scales": (scales + PAGE * 4, 4)}
        self.clear()

    @property
    def form(self) -> str:
        return f"pages of {self._shape.bits} bits"

    def specs(self, tokens: int) -> list[TensorSpec]:
        """Return specs of bytes, for whole blocks of tokens."""
        filled = -(-tokens // KEY_BLOCK) * KEY_BLOCK
        return [
            TensorSpec(name, torch.uint8, (self._shape.groups, filled, row))
            for name, (_, row) in self._parts.items()
        ]

    def content(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        filled = self._pages[layer][: -(-tokens // PAGE)]

        def joined(name: str) -> torch.Tensor:
            return torch.cat([self._part(page, name) for page in filled], dim=1)

        return {spec.name: joined(spec.name)[:, : spec.shape[1]] for spec in self.specs(tokens)}

    def clear(self) -> None:
        self.length = 0
        layers = range(self.config.num_hidden_layers)
        self._pages: list[list[torch.Tensor]] = [[] for _ in layers]
        self._addresses = [torch.empty(0, dtype=torch.int64) for _ in layers]

    def _restore(self, layer: int, content: dict[str, torch.Tensor], tokens: int) -> None:
        # First, so that no address of an old page is left.
        self._addresses[layer] = torch.empty(0, dtype=torch.int64)
        self._pages[layer] = []
        for start in range(0, tokens, PAGE):
            page = torch.zeros(self._shape.page_bytes, dtype=torch.uint8)
            for name, tensor in content.items():
                given = tensor[:, start : start + PAGE]
                self._part(page, name)[:, : given.shape[1]] = given
            self._pages[layer].append(page)

    def _part(self, page: torch.Tensor, name: str) -> torch.Tensor:
        """Return a view of a page's keys, values or scales, [G, PAGE, bytes]."""
        start, row = self._parts[name]
        groups = self._shape.groups
        return page.view(groups, -1)[:, start : start + PAGE * row].view(groups, PAGE, row)

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        addresses = self._with_room(layer, keys.shape[0])
        pages.store(self._shape, addresses, self.length, keys, values)

    def _with_room(self, layer: int, tokens: int) -> torch.Tensor:
        """Return the addresses of a layer's pages."""
        layer_pages = self._pages[layer]
        while len(layer_pages) * PAGE < self.length + tokens:
            layer_pages.append(torch.zeros(self._shape.page_bytes, dtype=torch.uint8))
        # An error may have come between a page and its address.
        if len(layer_pages) != self._addresses[layer].numel():
            self._addresses[layer] = torch.tensor([page.data_ptr() for page in layer_pages])
        return self._addresses[layer]

    def steps(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor
    ) -> tuple[Step, Step, Step]:
        """Return `attend` for one token as steps. Each needs the step before it."""
        attend = attention.attend_steps(self._shape, queries, out, self.capacity)
        return pages.store_step(self._shape, keys, values), *attend

    def set_layer(
        self, steps: tuple[Step, Step, Step], layer: int, sinks: torch.Tensor | None
    ) -> None:
        """Let the steps compute this layer, whose sinks they do not keep."""
        for step in steps[1:]:
            attention.set_window(self._shape, step, self.config.window(layer), sinks)

    def set_place(self, steps: tuple[Step, Step, Step], layer: int) -> None:
        """Let the steps compute the next token of a layer."""
        assert self.length < self.capacity
        pages = self._with_room(layer, 1).data_ptr()
        splits = attention.count_splits(self.length + 1)
        store, attend, merge = steps
        store.set(pages=pages, past=self.length)
        attend.set(pages=pages, past=self.length, splits=splits)
        merge.set(splits=splits)

    def _attend(
        self, layer: int, queries: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        window, addresses = self.config.window(layer), self._addresses[layer]
        end = self.length + queries.shape[0]
        # Ctrl-C is handled between two calls of some tenths of a second.
        tokens_per_call = max(_MIN_TOKENS_PER_CALL, _MAX_PAIRS_PER_CALL // end)
        past, attended = self.length, []
        for piece in torch.split(queries, tokens_per_call):
            interrupts.check()
            attended.append(attention.attend(self._shape, addresses, past, piece, window, sinks))
            past += piece.shape[0]
        return attended[0] if len(attended) == 1 else torch.cat(attended)


class TensorKVCache(KVCache):
    """A cache for torch's attention, on any device, of keys and values [G, tokens, h].

    With `quantized` it stores 8 bits a number and a scale for each key and value.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantized: bool = False,
    ) -> None:
        super().__init__(config, capacity)
        self._dtype, self._device, self._quantized = dtype, device, quantized
        self._masks: dict[tuple[int, int, int | None], torch.Tensor | None] = {}
        self.clear()

    @property
    def form(self) -> str:
        return f"{self._dtype} tensors{' in 8 bits' if self._quantized else ''}"

    def specs(self, tokens: int) -> list[TensorSpec]:
        """Return specs of keys and values [G, tokens, h], and of scales [G, tokens, 1]."""
        groups, width = self.config.num_key_value_heads, self.config.head_dim
        dtype = torch.int8 if self._quantized else self._dtype
        specs = [TensorSpec(name, dtype, (groups, tokens, width)) for name in ("keys", "values")]
        if self._quantized:
            scales = ("key_scales", "value_scales")
            specs += [TensorSpec(name, torch.float32, (groups, tokens, 1)) for name in scales]
        return specs

    def content(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        return {name: stored[layer][:, :tokens].cpu() for name, stored in self._stored.items()}

    def clear(self) -> None:
        self.length = 0
        self._stored = {  # a tensor for each layer
            spec.name: [torch.empty(spec.shape, dtype=spec.dtype, device=self._device)]
            * self.config.num_hidden_layers
            for spec in self.specs(0)
        }

    def _restore(self, layer: int, content: dict[str, torch.Tensor], tokens: int) -> None:
        for name, tensor in content.items():
            self._put(name, layer, tensor)

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        for name, given in (("key", keys), ("value", values)):
            numbers = given.transpose(0, 1)  # [G, T, h]
            if self._quantized:
                scales = numbers.float().abs().amax(-1, keepdim=True) / _INT8_MAX
                numbers = (numbers.float() / scales.clamp(min=1e-30)).round()
                self._put(f"{name}_scales", layer, scales)
            self._put(f"{name}s", layer, numbers)

    def _put(self, name: str, layer: int, new: torch.Tensor) -> None:
        """Store [G, T, n] after the first `length` tokens."""
        stored, end = self._stored[name], self.length + new.shape[1]
        old = stored[layer]
        if end > old.shape[1]:
            room = min(-(-end // _GROWTH) * _GROWTH, self.capacity)
            grown = old.new_empty(old.shape[0], room, old.shape[2])
            grown[:, : self.length] = old[:, : self.length]
            stored[layer] = grown
        stored[layer][:, self.length : end] = new

    def _attend(
        self, layer: int, queries: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        tokens, heads, _ = queries.shape
        groups = self.config.num_key_value_heads
        shared, window = heads // groups, self.config.window(layer)
        # The first token that the first query sees.
        start = 0 if window is None else max(0, self.length + 1 - window)
        seen = slice(start, self.length + tokens)
        keys, values = (self._widened(name, layer, seen) for name in ("key", "value"))
        mask = self._mask_of(self.length - start, tokens, window)
        # The R = H / G heads that share a key are joined like R times as many tokens. On a CPU
        # `enable_gqa` would read each key R times.
        grouped = queries.reshape(tokens, groups, shared, -1).permute(1, 2, 0, 3)  # [G, R, T, h]
        if sinks is None:
            attended = functional.scaled_dot_product_attention(
                grouped.reshape(1, groups, shared * tokens, -1),  # [1, G, R * T, h]
                keys[None],  # [1, G, P + T, h]
                values[None],
                attn_mask=None if mask is None else mask.repeat(shared, 1),  # [R * T, P + T]
            )
        else:
            attended = _attention_with_sinks(grouped, keys, values, mask, sinks)
        merged = attended.view(groups, shared, tokens, -1).permute(2, 0, 1, 3)  # [T, G, R, h]
        return merged.reshape(tokens, heads, -1)

    def _widened(self, name: str, layer: int, seen: slice) -> torch.Tensor:
        stored = self._stored[f"{name}s"][layer][:, seen]
        if not self._quantized:
            return stored
        return (stored * self._stored[f"{name}_scales"][layer][:, seen]).to(self._dtype)

    def _mask_of(self, past: int, tokens: int, window: int | None) -> torch.Tensor | None:
        """Return a mask, the same for all layers of a pass with the same window."""
        place = past, tokens, window
        if place not in self._masks:
            if len(self._masks) == _MASKS:
                self._masks.clear()
            self._masks[place] = attention_mask(*place, self._device)
        return self._masks[place]


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
    pieces = []
    # Scores take 4 bytes for each head and pair of tokens.
    for start in range(0, tokens, _SINK_TOKENS):
        part = slice(start, start + _SINK_TOKENS)
        scores = queries[:, :, part] @ keys.mT[:, None] * width**-0.5  # [G, R, t, P + T]
        if mask is not None:
            scores = scores.masked_fill(~mask[part], -torch.inf)
        sink = sinks.view(groups, shared, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        pieces.append(weights.to(values.dtype) @ values[:, None])
    return torch.cat(pieces, dim=2)


def attention_mask(
    past: int, tokens: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Return which of P + T positions each of T tokens may see [T, P + T]. None is all of them.

    Past 1, tokens 2 and window 2 give [[1, 1, 0], [0, 1, 1]].
    """
    sees_all = window is None or past + tokens <= window
    if tokens == 1 and sees_all:
        return None
    position = torch.arange(past, past + tokens, device=device)[:, None]
    other = torch.arange(past + tokens, device=device)[None]
    mask = other <= position
    return mask if window is None else mask & (other > position - window)
