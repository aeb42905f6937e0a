"""A KV cache in the memory of GPUs, which is taken once.

T = new tokens, P = tokens before them, H = num_attention_heads, G = num_key_value_heads,
h = head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.kv_cache import layer_room
from mixchat.engine.tensor_cache import PlainKVCache
from mixchat.kernels.cpu.pages import PAGE
from mixchat.kernels.gpu.attention import Parts, attend
from mixchat.kernels.gpu.kv_store import KVTensors, store


class DeviceKVCache(PlainKVCache):
    """A cache for the kernels of GPUs. `on` names the GPU of each layer.

    A layer has room for `capacity` tokens, or with a window for those that it keeps. This room is a
    ring: the token p lies at p % room. In a ring of 3,072 tokens, token 5,000 lies at 1,928, in the
    place of token 1,928. The layer's first token is then 2,048, or a later page's.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        dtype: torch.dtype,
        on: Sequence[torch.device],
        *,
        quantized: bool = False,
    ) -> None:
        super().__init__(config, capacity, dtype, quantized=quantized)
        layers: dict[int, KVTensors] = {}
        for device in dict.fromkeys(on):
            layers |= self._new_layers(device, [n for n, each in enumerate(on) if each == device])
        self._layers = [layers[number] for number in range(len(on))]
        self._rings = [n for n, tensors in enumerate(self._layers) if tensors.room < capacity]
        devices = {tensors.numbers.device for tensors in self._layers}
        # The tokens before a pass, as a number and as what the kernels of each GPU read.
        self._past = {
            device: (0, torch.zeros(1, dtype=torch.int32, device=device)) for device in devices
        }
        self.clear()

    def _new_layers(self, device: torch.device, layers: Sequence[int]) -> dict[int, KVTensors]:
        """Return the tensors of a GPU's layers, parts of one block.

        torch would round the size of each to 2 MB.
        """
        groups, width = self.config.num_key_value_heads, self.config.head_dim
        rows = [2 * groups * layer_room(self.config, self.capacity, layer) for layer in layers]
        sizes = [count * width * self._stored_dtype.itemsize for count in rows]
        scales = [4 * count for count in rows] if self._quantized else []
        block = torch.empty(sum(sizes) + sum(scales), dtype=torch.uint8, device=device)
        pieces = torch.split(block, [*sizes, *scales])
        tensors = {}
        for place, layer in enumerate(layers):
            numbers = pieces[place].view(self._stored_dtype).view(2, groups, -1, width)
            # Scales lie behind all numbers, which stay aligned for wide loads.
            behind = pieces[len(layers) + place].view(torch.float32) if scales else None
            tensors[layer] = KVTensors(
                numbers, None if behind is None else behind.view(2, groups, -1)
            )
        return tensors

    def layer(self, layer: int) -> KVTensors:
        """Return the keys and values of a layer, whose addresses never change."""
        return self._layers[layer]

    def clear(self) -> None:
        """Empty the cache, which keeps its memory."""
        self.length = 0
        self._firsts = [0] * self.config.num_hidden_layers

    def advance(self, tokens: int) -> None:
        past = self.length
        super().advance(tokens)
        # Graphs store a token without a call of `store`.
        for layer in self._rings:
            self._keep(layer, past, self.length)

    def _keep(self, layer: int, past: int, end: int) -> None:
        """Note the first token that a layer keeps as it stores those before `end`.

        It counts one more, which a graph may have stored in a pass that was interrupted. All that
        the token after `past` sees is kept, as in the other caches.
        """
        first, room = self._firsts[layer] if past else 0, self._layers[layer].room
        if layer in self._rings and end + 1 - first > room:
            first = -(-(end + 1 - room) // PAGE) * PAGE
        self._firsts[layer] = first

    def _pieces(self, layer: int, start: int, end: int) -> Iterator[tuple[slice, slice]]:
        """Yield slices of the tokens from `start` on, from 0, and their places in the ring."""
        room, token = self._layers[layer].room, start
        while token < end:
            place = token % room
            count = min(end - token, room - place)
            yield slice(token - start, token - start + count), slice(place, place + count)
            token += count

    def _named(self, layer: int) -> dict[str, torch.Tensor]:
        """Return views of a layer's tensors by their names in `content`, [G, room, n]."""
        numbers, scales = self._layers[layer]
        named = {"keys": numbers[0], "values": numbers[1]}
        if scales is not None:
            named |= {"key_scales": scales[0, ..., None], "value_scales": scales[1, ..., None]}
        return named

    def content(self, layer: int, tokens: int) -> dict[str, torch.Tensor]:
        pieces = list(self._pieces(layer, self._start(layer, self.first), tokens))
        return {
            name: torch.cat([tensor[:, places].cpu() for _, places in pieces], dim=1)
            for name, tensor in self._named(layer).items()
        }

    def restore(
        self, layer: int, content: dict[str, torch.Tensor], tokens: int, first: int = 0
    ) -> None:
        self._check_content(layer, content, tokens, first)
        start = self._firsts[layer] = self._start(layer, first)
        # A cache that grows may have kept more tokens than there is room for.
        self._keep(layer, 1, tokens)
        kept = self._firsts[layer]
        for name, tensor in self._named(layer).items():
            for chosen, places in self._pieces(layer, kept, tokens):
                tensor[:, places] = content[name][:, kept - start :][:, chosen]

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._store(layer, self.length, keys, values)

    def _store(
        self, layer: int, past: int, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Store keys and values after `past` tokens, a number that is returned for the kernels."""
        tensors, end = self._layers[layer], past + keys.shape[0]
        assert end <= self.capacity
        # First, since the kernel may have stored tokens when an interruption is seen.
        self._keep(layer, past, end)
        device = tensors.numbers.device
        number, on_device = self._past[device]
        if number != past:
            on_device.fill_(past)
            self._past[device] = past, on_device
        store(tensors, keys, values, on_device)
        return on_device

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tensors, window = self._layers[layer], self.config.window(layer)
        out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        tokens, heads, _ = queries.shape
        # What a ring takes without losing what the first of these tokens sees.
        most = tokens if tensors.room == self.capacity else tensors.room - (window or 0)
        for start in range(0, tokens, most):
            chunk = slice(start, start + most)
            past = self._store(layer, self.length + start, keys[chunk], values[chunk])
            some = queries[chunk].contiguous()
            parts = Parts.for_tokens(some.shape[0], heads, tensors, window)
            attend(some, tensors, past, out[chunk], parts, window, sinks)
        return out
