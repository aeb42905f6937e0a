"""STUB."""

from __future__ import annotations
import torch
from mixchat.engine.kv_cache import KVCache
from mixchat.kernels.gpu.attention import Parts, attend
from mixchat.kernels.gpu.kv_store import KVTensors, store


class DeviceKVCache(KVCache):
    def __init__(self, config, capacity, dtype, on, quantized=False):
        super().__init__(config, capacity)
        g, h = config.num_key_value_heads, config.head_dim
        self._layers = []
        for d in on:
            self._layers.append(
                KVTensors(
                    torch.zeros(
                        2, g, capacity, h, dtype=torch.int8 if quantized else dtype, device=d
                    ),
                    torch.zeros(2, g, capacity, device=d) if quantized else None,
                )
            )

    form = "x"

    def layer(self, n):
        return self._layers[n]

    def specs(self, layer, tokens, first):
        return []

    def content(self, layer, tokens):
        return {}

    def clear(self):
        self.length = 0

    def restore(self, *a): ...
    def store(self, layer, keys, values):
        t = self._layers[layer]
        past = torch.tensor([self.length], dtype=torch.int32).to(keys.device, non_blocking=True)
        store(t, keys, values, past)

    def attend(self, layer, queries, keys, values, sinks=None):
        t = self._layers[layer]
        past = torch.tensor([self.length], dtype=torch.int32).to(queries.device, non_blocking=True)
        store(t, keys, values, past)
        out = torch.empty_like(queries)
        attend(
            queries.contiguous(),
            t,
            past,
            out,
            Parts.for_tokens(len(queries), queries.shape[1], t, self.config.window(layer)),
            self.config.window(layer),
            sinks,
        )
        return out
