"""A KV cache in pages, and the choice of a cache.

T = new tokens, P = tokens before them, H = num_attention_heads, G = num_key_value_heads,
h = head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixchat.base import gpu, interrupts
from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import TensorSpec
from mixchat.engine.kv_cache import KVCache, bits_of
from mixchat.engine.tensor_cache import TensorKVCache
from mixchat.kernels.cpu import attention, pages
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.kernels.cpu.pages import KEY_BLOCK, PAGE, Bits, CacheShape
from mixchat.kernels.cpu.program import Program, Step, together

# Of a call to the kernel. Pairs are of a new token and one that it may see. With more, the parts
# that it merges leave the CPU's caches, and each call waits for new memory.
_MAX_PAIRS_PER_CALL, _MIN_TOKENS_PER_CALL = 2**19, 32
_NO_PAGE = torch.empty(0, dtype=torch.uint8)  # of tokens that no window reaches, at the address 0


def new_cache(
    config: ModelConfig,
    capacity: int,
    dtype: torch.dtype,
    on: Sequence[torch.device],
    bits: Bits | None = None,
) -> KVCache:
    """Return the fastest kind of cache, for layers on these devices.

    bits: None for the bits of `dtype`.
    """
    if gpu.is_gpu(on[0]):
        # Triton is imported only if a GPU computes.
        from mixchat.engine.device_cache import DeviceKVCache

        return DeviceKVCache(config, capacity, dtype, on, quantized=bits == 8)
    if dtype != torch.float16 and kernels_available():
        return PagedKVCache(config, capacity, bits or bits_of(dtype))
    return TensorKVCache(config, capacity, dtype, quantized=bits == 8)


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

    def specs(self, layer: int, tokens: int, first: int) -> list[TensorSpec]:
        """Return specs of bytes, for whole blocks of tokens."""
        filled = -(-tokens // KEY_BLOCK) * KEY_BLOCK - self._start(layer, first)
        return [
            TensorSpec(name, torch.uint8, (self._shape.groups, filled, row))
            for name, (_, row) in self._parts.items()
        ]

    def content(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        first = self._start(layer, self.first) // PAGE
        filled = self._pages[layer][first : -(-tokens // PAGE)]

        def joined(name: str) -> torch.Tensor:
            return torch.cat([self._part(page, name) for page in filled], dim=1)

        specs = self.specs(layer, tokens, self.first)
        return {spec.name: joined(spec.name)[:, : spec.shape[1]] for spec in specs}

    def clear(self) -> None:
        self.length = 0
        layers = range(self.config.num_hidden_layers)
        self._firsts = [0 for _ in layers]
        self._pages: list[list[torch.Tensor]] = [[] for _ in layers]
        self._addresses = [torch.empty(0, dtype=torch.int64) for _ in layers]

    def restore(
        self, layer: int, content: dict[str, torch.Tensor], tokens: int, first: int = 0
    ) -> None:
        self._check_content(layer, content, tokens, first)
        # The addresses go first, so that none of an old page is left.
        self._addresses[layer] = torch.empty(0, dtype=torch.int64)
        self._firsts[layer] = start = self._start(layer, first)
        self._pages[layer] = [_NO_PAGE] * (start // PAGE)
        for offset in range(0, tokens - start, PAGE):
            # Zeros, which the kernel needs after the last token.
            page = torch.zeros(self._shape.page_bytes, dtype=torch.uint8)
            for name, tensor in content.items():
                rows = tensor[:, offset : offset + PAGE]
                self._part(page, name)[:, : rows.shape[1]] = rows
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
        """Return the addresses of a layer's pages, with room for T new tokens."""
        addresses = self._addresses[layer]
        # Almost always a token fits into the last page, and no list has to be made.
        if addresses.numel() * PAGE >= self.length + tokens and self.length >= self._firsts[layer]:
            return addresses
        first, end = self._first_to_keep(layer, tokens), -(-(self.length + tokens) // PAGE)
        kept = [_NO_PAGE] * (first // PAGE) + self._pages[layer][first // PAGE : end]
        kept += [_NO_PAGE] * (end - len(kept))
        for number in range(first // PAGE, len(kept)):
            if not kept[number].numel():
                kept[number] = torch.zeros(self._shape.page_bytes, dtype=torch.uint8)
        addresses = torch.tensor([page.data_ptr() for page in kept])
        # Last, because memory for a page may be missing.
        self._pages[layer], self._addresses[layer] = kept, addresses
        self._firsts[layer] = first
        return addresses

    def steps(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        most_keys: int,
    ) -> tuple[Step, Step, Step]:
        """Return `attend` for one token as steps: store, attend and merge, in this order.

        most_keys: the keys that the token attends to, at most.
        """
        attend = attention.attend_steps(self._shape, queries, out, most_keys)
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

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        past, end = self.length, self.length + keys.shape[0]
        assert end <= self.capacity
        self.store(layer, keys, values)
        window, addresses = self.config.window(layer), self._addresses[layer]
        # Ctrl-C is handled between two calls of some hundredths of a second.
        tokens_per_call = max(_MIN_TOKENS_PER_CALL, _MAX_PAIRS_PER_CALL // end)
        attended = []
        for chunk in torch.split(queries, tokens_per_call):
            interrupts.check()
            attended.append(attention.attend(self._shape, addresses, past, chunk, window, sinks))
            past += chunk.shape[0]
        return attended[0] if len(attended) == 1 else torch.cat(attended)


class SequencesAttention:
    """The attention of one new token for each of several caches, as a program for each layer.

    A call of a kernel for each cache takes longer than the attention over some hundred keys. N
    caches have N tokens. The tensors are like those that the layers give it.
    """

    def __init__(
        self,
        caches: Sequence[PagedKVCache],
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        self._caches = caches
        self._inputs = [
            torch.empty(rows.shape, dtype=rows.dtype) for rows in (queries, keys, values)
        ]
        self._out = torch.empty_like(self._inputs[0])
        by_token = [torch.split(rows, 1) for rows in (*self._inputs, self._out)]
        self._steps = [
            cache.steps(query, key, value, out, cache.length + 1)
            for cache, query, key, value, out in zip(caches, *by_token, strict=True)
        ]
        self._program = Program([together(*steps) for steps in zip(*self._steps, strict=True)])

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the attention [N, H, h], as `KVCache.attend` does. The next call overwrites it."""
        for mine, rows in zip(self._inputs, (queries, keys, values), strict=True):
            mine.copy_(rows)
        for cache, steps in zip(self._caches, self._steps, strict=True):
            cache.set_layer(steps, layer, sinks)
            cache.set_place(steps, layer)
        self._program.run()
        return self._out
