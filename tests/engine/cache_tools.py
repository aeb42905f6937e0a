"""Caches of sequences of each kind."""

from collections.abc import Sequence

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.caches.paged_cache import PagedKVCache
from mixchat.engine.caches.sequence_cache import SequenceCache, bits_of, kv_shape
from mixchat.engine.caches.tensor_cache import Masks, TensorKVCache
from mixchat.kernels.cpu.pages import Bits


def in_pages(config: ModelConfig, capacity: int, bits: Bits) -> SequenceCache:
    layers = [
        PagedKVCache(kv_shape(config, layer, bits), capacity, config.window(layer))
        for layer in range(config.num_hidden_layers)
    ]
    return SequenceCache(config, capacity, layers, 0)


def in_tensors(
    config: ModelConfig, capacity: int, dtype: torch.dtype, bits: Bits | None = None
) -> SequenceCache:
    masks, bits = Masks(), bits or bits_of(dtype)
    layers = [
        TensorKVCache(kv_shape(config, layer, bits), capacity, config.window(layer), dtype, masks)
        for layer in range(config.num_hidden_layers)
    ]
    return SequenceCache(config, capacity, layers, 0)


def on_gpus(
    config: ModelConfig,
    capacity: int,
    dtype: torch.dtype,
    on: Sequence[torch.device],
    bits: Bits | None = None,
) -> SequenceCache:
    from mixchat.engine.caches.device_cache import device_caches

    shapes = {layer: kv_shape(config, layer, bits or bits_of(dtype)) for layer in range(len(on))}
    windows = {layer: config.window(layer) for layer in shapes}
    layers = device_caches(shapes, capacity, windows, dtype, dict(enumerate(on)))
    return SequenceCache(config, capacity, [layers[layer] for layer in shapes], 0)


def attend(
    cache: SequenceCache, new: Sequence[torch.Tensor], sinks: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """Return the attention of each layer for tokens with 4 heads, 2 of them of keys [T, 8, h]."""
    return [
        layer.attend(x[:, :4], x[:, 4:6], x[:, 6:], sink)
        for layer, x, sink in zip(cache.layers, new, sinks, strict=True)
    ]


def store(cache: SequenceCache, new: Sequence[torch.Tensor]) -> None:
    """Store the tokens of `attend`, which is faster than to attend to them."""
    for layer, x in zip(cache.layers, new, strict=True):
        layer.store(x[:, 4:6], x[:, 6:])
