"""Keys and values of a layer in pages, for the CPU's kernels.

T = new tokens, P = tokens before them, H = num_attention_heads, G = num_key_value_heads,
h = head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch

from mixchat.base import interrupts
from mixchat.base.safetensors import TensorSpec
from mixchat.engine.caches.kv_cache import KVCache
from mixchat.engine.caches.layer_cache import Extent
from mixchat.kernels.cpu import attention, pages
from mixchat.kernels.cpu.pages import KEY_BLOCK, PAGE, CacheShape
from mixchat.kernels.cpu.program import Program, together

# Of a call to the kernel. Pairs are of a new token and one that it may see. With more, the parts
# that it merges leave the CPU's caches, and each call waits for new memory.
_MAX_PAIRS_PER_CALL = 2**19
_MIN_TOKENS_PER_CALL = 32
_NO_PAGE = torch.empty(0, dtype=torch.uint8)  # of tokens that no window reaches, at the address 0


class PagedKVCache(KVCache):
    """A cache for the CPU's kernel, in pages of 512 tokens, which never move."""

    has_steps = True

    def __init__(self, shape: CacheShape, capacity: int, window: int | None) -> None:
        super().__init__(shape, capacity, window)
        row = shape.width * shape.bits // 8
        scales = shape.scales_at
        # The start in a group's part of a page, and the bytes of one token.
        self._parts = {"values": (shape.values_at, row)}
        if not shape.latent_dim:
            self._parts = {"keys": (0, row), **self._parts}
        if shape.bits == 8:
            self._parts |= {"key_scales": (scales, 4), "value_scales": (scales + PAGE * 4, 4)}
        self.clear()

    @property
    def form(self) -> str:
        return f"pages of {self.shape.bits} bits"

    def specs(self, extent: Extent) -> list[TensorSpec]:
        """Return specs of bytes, for whole blocks of tokens."""
        filled = -(-extent.tokens // KEY_BLOCK) * KEY_BLOCK - self._start(extent)
        return [
            TensorSpec(name, torch.uint8, (self.shape.groups, filled, row))
            for name, (_, row) in self._parts.items()
        ]

    def content(self, extent: Extent) -> dict[str, torch.Tensor]:
        filled = self._pages[self._start(extent) // PAGE : -(-extent.tokens // PAGE)]

        def joined(name: str) -> torch.Tensor:
            return torch.cat([self._part(page, name) for page in filled], dim=1)

        return {spec.name: joined(spec.name)[:, : spec.shape[1]] for spec in self.specs(extent)}

    def clear(self) -> None:
        self.length = self._first = 0
        self._pages: list[torch.Tensor] = []
        self._addresses = torch.empty(0, dtype=torch.int64)

    def _restore(self, content: dict[str, torch.Tensor], extent: Extent, length: int) -> None:
        # The addresses go first, so that none of an old page is left.
        self._addresses = torch.empty(0, dtype=torch.int64)
        self._first = start = self._start(extent)
        self._pages = [_NO_PAGE] * (start // PAGE)
        for offset in range(0, length - start, PAGE):
            # Zeros, which the kernel needs after the last token.
            page = torch.zeros(self.shape.page_bytes, dtype=torch.uint8)
            for name, tensor in content.items():
                rows = tensor[:, offset : offset + PAGE]
                self._part(page, name)[:, : rows.shape[1]] = rows
            self._pages.append(page)

    def _part(self, page: torch.Tensor, name: str) -> torch.Tensor:
        """Return a view of a page's keys, values or scales, [G, PAGE, bytes]."""
        start, row = self._parts[name]
        groups = self.shape.groups
        return page.view(groups, -1)[:, start : start + PAGE * row].view(groups, PAGE, row)

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        addresses = self._with_room(keys.shape[0])
        pages.store(self.shape, addresses, self.length, keys, values)

    def _with_room(self, tokens: int) -> torch.Tensor:
        """Return the addresses of the pages, with room for T new tokens."""
        addresses = self._addresses
        end = self.length + tokens
        # Almost always a token fits into the last page, and no list has to be made.
        if addresses.numel() * PAGE >= end and self.length >= self._first:
            return addresses
        first = self._first_to_keep(tokens)
        count = -(-end // PAGE)
        kept = [_NO_PAGE] * (first // PAGE) + self._pages[first // PAGE : count]
        kept += [_NO_PAGE] * (count - len(kept))
        for number in range(first // PAGE, len(kept)):
            if not kept[number].numel():
                kept[number] = torch.zeros(self.shape.page_bytes, dtype=torch.uint8)
        addresses = torch.tensor([page.data_ptr() for page in kept])
        # Last, because memory for a page may be missing.
        self._pages = kept
        self._addresses = addresses
        self._first = first
        return addresses

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        past = self.length
        end = self.length + keys.shape[0]
        assert end <= self.capacity
        self.store(keys, values)
        # Ctrl-C is handled between two calls of some hundredths of a second.
        tokens_per_call = max(_MIN_TOKENS_PER_CALL, _MAX_PAIRS_PER_CALL // end)
        attended = []
        for chunk in torch.split(queries, tokens_per_call):
            interrupts.check()
            attended.append(
                attention.attend(self.shape, self._addresses, past, chunk, self.window, sinks)
            )
            past += chunk.shape[0]
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def set_place(self, steps: KVSteps) -> None:
        """Let the steps compute the next token of this cache."""
        assert self.length < self.capacity
        steps.set(self._with_room(1), self.length)


class KVSteps:
    """`KVCache.attend` for one token, in three steps: `store`, `attend` and `merge`, in this order.

    most_keys: the keys that the token attends to, at most.
    """

    def __init__(
        self,
        shape: CacheShape,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        most_keys: int,
    ) -> None:
        self._shape = shape
        self.store = pages.store_step(shape, keys, values)
        self.attend, self.merge = attention.attend_steps(shape, queries, out, most_keys)

    def for_layer(self, window: int | None, sinks: torch.Tensor | None) -> KVSteps:
        """Return steps for a layer, with the same tensors. They do not keep its sinks alive."""
        steps = copy(self)
        steps.store, steps.attend, steps.merge = (
            step.copy() for step in (self.store, self.attend, self.merge)
        )
        steps.set_layer(window, sinks)
        return steps

    def set_layer(self, window: int | None, sinks: torch.Tensor | None) -> None:
        """Let the steps compute a layer, whose sinks they do not keep alive."""
        for step in (self.attend, self.merge):
            attention.set_window(self._shape, step, window, sinks)

    def set(self, addresses: torch.Tensor, past: int) -> None:
        """Let the steps compute the token after `past` others in these pages."""
        splits = attention.count_splits(past + 1)
        per_item = attention.rows_per_item(self._shape, splits)
        self.store.set(pages=addresses.data_ptr(), past=past)
        self.attend.set(pages=addresses.data_ptr(), past=past, splits=splits, per_item=per_item)
        self.merge.set(splits=splits)


class SequencesAttention:
    """The attention of one new token for each of several sequences, as a program for each layer.

    A call of a kernel for each sequence takes longer than the attention over some hundred keys. N
    sequences have N tokens. The tensors are like those that layers of this shape give it.
    """

    def __init__(
        self,
        caches: Sequence[PagedKVCache],
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        self._inputs = [
            torch.empty(rows.shape, dtype=rows.dtype) for rows in (queries, keys, values)
        ]
        self._out = queries.new_empty(*queries.shape[:2], caches[0].shape.value_dim)
        by_token = zip(*(torch.split(rows, 1) for rows in (*self._inputs, self._out)), strict=True)
        self._steps = [
            KVSteps(cache.shape, query, key, value, out, cache.length + 1)
            for cache, (query, key, value, out) in zip(caches, by_token, strict=True)
        ]
        stages = zip(*((each.store, each.attend, each.merge) for each in self._steps), strict=True)
        self._program = Program([together(*steps) for steps in stages])

    def attend(
        self,
        caches: Sequence[PagedKVCache],
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the attention [N, H, h], as `KVCache.attend` does, for a layer's caches.

        The next call overwrites it.
        """
        for mine, rows in zip(self._inputs, (queries, keys, values), strict=True):
            mine.copy_(rows)
        for cache, steps in zip(caches, self._steps, strict=True):
            steps.set_layer(cache.window, sinks)
            cache.set_place(steps)
        self._program.run()
        return self._out
