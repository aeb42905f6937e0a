"""Keys and values of a layer in the memory of a GPU, which is taken once.

T = new tokens, P = tokens before them, H = num_attention_heads, G = num_key_value_heads,
h = head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from mixchat.engine.caches.kv_cache import room_of
from mixchat.engine.caches.layer_cache import Extent, LayerCache
from mixchat.engine.caches.tensor_cache import PlainKVCache, in_8_bits
from mixchat.kernels.cpu.pages import PAGE, CacheShape
from mixchat.kernels.gpu.attention import Parts, attend
from mixchat.kernels.gpu.kv_store import KVTensors, store


class Past:
    """The tokens before a pass, as a number and as what the kernels of a GPU read."""

    def __init__(self, device: torch.device) -> None:
        self._number = 0
        self._on_device = torch.zeros(1, dtype=torch.int32, device=device)

    def at(self, past: int) -> torch.Tensor:
        """Return the tensor of this number."""
        if self._number != past:
            self._on_device.fill_(past)
            self._number = past
        return self._on_device


class DeviceKVCache(PlainKVCache):
    """A cache for the kernels of GPUs.

    It has room for `capacity` tokens, or with a window for those that the layer keeps. This room is
    a ring: the token p lies at p % room. In a ring of 3,072 tokens, token 5,000 lies at 1,928, in
    the place of token 1,928. The layer's first token is then 2,048, or a later page's.
    """

    def __init__(
        self,
        shape: CacheShape,
        capacity: int,
        window: int | None,
        dtype: torch.dtype,
        tensors: KVTensors,
        past: Past,
    ) -> None:
        super().__init__(shape, capacity, window, dtype)
        self.tensors, self._past = tensors, past  # tensors whose addresses never change
        self._is_ring = tensors.room < capacity

    @property
    def device(self) -> torch.device:
        return self.tensors.numbers.device

    def clear(self) -> None:
        """Empty the cache, which keeps its memory."""
        self.length = self._first = 0

    def advance(self, tokens: int) -> None:
        # Graphs store a token without a call of `store`.
        self._keep(self.length, self.length + tokens)
        super().advance(tokens)

    def _keep(self, past: int, end: int) -> None:
        """Note the first token that the layer keeps as it stores those before `end`.

        It counts one more, which a graph may have stored in a pass that was interrupted. All that
        the token after `past` sees is kept, as in the other caches.
        """
        first = self._first if past else 0
        room = self.tensors.room
        if self._is_ring and end + 1 - first > room:
            first = -(-(end + 1 - room) // PAGE) * PAGE
        self._first = first

    def _pieces(self, start: int, end: int) -> Iterator[tuple[slice, slice]]:
        """Yield slices of the tokens from `start` on, from 0, and their places in the ring."""
        room = self.tensors.room
        token = start
        while token < end:
            place = token % room
            count = min(end - token, room - place)
            yield slice(token - start, token - start + count), slice(place, place + count)
            token += count

    def _named(self) -> dict[str, torch.Tensor]:
        """Return views of the tensors by their names in `content`, [G, room, n]."""
        numbers, scales, rotating = self.tensors
        # Of latents, only values are numbers.
        named = {"keys": numbers[0] if rotating is None else rotating, "values": numbers[-1]}
        if scales is not None:
            named |= {"key_scales": scales[0, ..., None], "value_scales": scales[1, ..., None]}
        return named

    def content(self, extent: Extent) -> dict[str, torch.Tensor]:
        pieces = list(self._pieces(self._start(extent), extent.tokens))
        return {
            name: torch.cat([tensor[:, places].cpu() for _, places in pieces], dim=1)
            for name, tensor in self._named().items()
        }

    def _restore(self, content: dict[str, torch.Tensor], extent: Extent, length: int) -> None:
        start = self._first = self._start(extent)
        # A cache that grows may have kept more tokens than there is room for.
        self._keep(1, length)
        kept = self._first
        for name, tensor in self._named().items():
            for chosen, places in self._pieces(kept, length):
                tensor[:, places] = content[name][:, kept - start :][:, chosen]

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._store(self.length, keys, values)

    def _store(self, past: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Store keys and values after `past` tokens, a number that is returned for the kernels."""
        end = past + keys.shape[0]
        assert end <= self.capacity
        # First, since the kernel may have stored tokens when an interruption is seen.
        self._keep(past, end)
        on_device = self._past.at(past)
        if self.shape.latent_dim:
            self._store_latents(slice(past, end), keys, values)
        else:
            store(self.tensors, keys, values, on_device)
        return on_device

    def _store_latents(self, places: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        named = self._named()
        for name, new in (("key", keys), ("value", values)):
            numbers = new.transpose(0, 1)  # [1, T, n]
            if self._quantized:
                numbers, named[f"{name}_scales"][:, places] = in_8_bits(numbers)
            named[f"{name}s"][:, places] = numbers

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tensors = self.tensors
        window = self.window
        tokens, heads, _ = queries.shape
        out = queries.new_empty(tokens, heads, self.shape.value_dim)
        # What a ring takes without losing what the first of these tokens sees.
        most = tokens if not self._is_ring else tensors.room - (window or 0)
        for start in range(0, tokens, most):
            chunk = slice(start, start + most)
            past = self._store(self.length + start, keys[chunk], values[chunk])
            some = queries[chunk].contiguous()
            parts = Parts.for_tokens(some.shape[0], heads, tensors, window)
            scale = self.shape.score_scale
            attend(some, tensors, past, out[chunk], parts, window, sinks, scale=scale)
        return out


def device_caches(
    shapes: Mapping[int, CacheShape],
    capacity: int,
    windows: Mapping[int, int | None],
    dtype: torch.dtype,
    on: Mapping[int, torch.device],
) -> dict[int, LayerCache]:
    """Return the caches of layers, each with its window, on these GPUs.

    The tensors of a GPU's layers are parts of one block. torch would round the size of each to 2
    MB.
    """
    caches: dict[int, LayerCache] = {}
    for device in dict.fromkeys(on.values()):
        layers = [layer for layer, each in on.items() if each == device]
        past = Past(device)
        stored = {layer: torch.int8 if shapes[layer].bits == 8 else dtype for layer in layers}
        rows = {layer: shapes[layer].groups * room_of(capacity, windows[layer]) for layer in layers}
        columns = {n: shapes[n].key_dim + shapes[n].value_dim for n in layers}
        sizes = [rows[n] * columns[n] * stored[n].itemsize for n in layers]
        scales = [8 * rows[n] if shapes[n].bits == 8 else 0 for n in layers]
        block = torch.empty(sum(sizes) + sum(scales), dtype=torch.uint8, device=device)
        pieces = torch.split(block, [*sizes, *scales])
        # Scales lie behind all numbers, which stay aligned for wide loads.
        for layer, piece, behind in zip(layers, pieces, pieces[len(layers) :], strict=False):
            shape = shapes[layer]
            window = windows[layer]
            scale = behind.view(torch.float32).view(2, shape.groups, -1) if len(behind) else None
            numbers = piece.view(stored[layer])
            rotating = None
            if shape.latent_dim:
                ends = [rows[layer] * columns for columns in (shape.value_dim, shape.key_dim)]
                latents, others = torch.split(numbers, ends)
                numbers = latents.view(1, 1, -1, shape.value_dim)
                rotating = others.view(1, -1, shape.key_dim)
            else:
                numbers = numbers.view(2, shape.groups, -1, shape.head_dim)
            tensors = KVTensors(numbers, scale, rotating)
            caches[layer] = DeviceKVCache(shape, capacity, window, dtype, tensors, past)
    return caches
