"""The caches of all layers for one sequence, and the choice of their kinds.

T = new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from mixchat.base import gpu
from mixchat.base.model_config import ModelConfig
from mixchat.engine.caches.checkpoints import checkpoint_counts, kept_checkpoints, spacing_of
from mixchat.engine.caches.kv_cache import room_of, token_bytes
from mixchat.engine.caches.layer_cache import Extent, LayerCache
from mixchat.engine.caches.paged_cache import PagedKVCache
from mixchat.engine.caches.state_cache import StateCache, state_bytes
from mixchat.engine.caches.tensor_cache import Masks, TensorKVCache
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.kernels.cpu.delta_net import DeltaNetShape
from mixchat.kernels.cpu.pages import Bits, CacheShape
from mixchat.kernels.gpu.splits import token_scratch


class TokenContext(Protocol):
    """The tokens before a pass, in the caches of one or several sequences."""

    programs: dict[Hashable, Any]  # that mixers make once in a pass

    @property
    def caches(self) -> Sequence[SequenceCache]:
        """Return the caches of the sequences in the pass."""

    def positions(self, tokens: int) -> slice | torch.Tensor:
        """Return the positions of the next T tokens in their sequences."""

    def pieces(self, layer: int) -> Sequence[tuple[slice, LayerCache]]:
        """Return the rows of each sequence in the pass, and its cache of this layer."""

    def advance(self, tokens: int) -> None:
        """Count new tokens, after all layers have added them."""


class SequenceCache:
    """The caches of the layers, which hold the first `length` tokens of a sequence.

    It is a `TokenContext` for passes over this sequence alone.

    Layers with a state can be cut to their checkpoints alone, at most `checkpoints` of them.
    `kept_checkpoints` says which stay.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, layers: Sequence[LayerCache], checkpoints: int
    ) -> None:
        self.config = config
        self.capacity = capacity
        self.layers = layers
        self.programs: dict[Hashable, Any] = {}
        self.needs_checkpoints = any(layer.needs_checkpoints for layer in layers)
        self._max_checkpoints = checkpoints
        self._spacing = spacing_of(capacity)
        self.clear()

    def clear(self) -> None:
        for layer in self.layers:
            layer.clear()
        self.length = 0
        self._checkpoints: list[int] = []
        self._turns: set[int] = set()  # the checkpoints at ends of turns
        self._latest: set[int] = set()  # those of the last turn
        self._lengths: list[int] = []  # of checkpoints that passes make as they reach them

    @property
    def caches(self) -> list[SequenceCache]:
        return [self]

    @property
    def form(self) -> str:
        """Return the name of the form. Content fits into caches of the same form."""
        return " and ".join(dict.fromkeys(layer.form for layer in self.layers))

    @property
    def extent(self) -> Extent:
        first = max(layer.first for layer in self.layers)
        return Extent(self.length, first, tuple(self._checkpoints)).until(self.length)

    def extent_to_save(self, checkpoints: int) -> Extent:
        """Return the extent with at most so many checkpoints, those that help most."""
        extent = self.extent
        kept = self._thinned(extent.checkpoints, self.length, checkpoints)
        return replace(extent, checkpoints=tuple(kept))

    def is_like(self, cache: SequenceCache) -> bool:
        mine = (self.config, self.capacity)
        theirs = (cache.config, cache.capacity)
        return mine == theirs and self.form == cache.form

    def usable(self, length: int, extent: Extent | None = None) -> int:
        """Return the most tokens, up to `length`, that the cache can be cut to.

        extent: of a file's content, None for the cache's own.
        """
        extent = self.extent if extent is None else extent
        most = -1
        while length != most:
            most = length
            for layer in self.layers:
                length = layer.usable(length, extent)
        return length

    def begin(self, ends: Collection[int], places: Collection[int] = ()) -> None:
        """Choose the checkpoints that passes make as they reach them.

        ends: of the question, which the next turn and /regen go back to. The last one is the
        prompt's. places: others, up to there, at which a later text may part from this one. The
        turn begins at the last of them before its question ends, and /undo goes back there.

        All are chosen now, because a pass of a long prompt would hold the states of all places.
        """
        if not self.needs_checkpoints:
            return
        regular = range(self._spacing, self.capacity, self._spacing)
        end = max(ends)
        least = max(self.length, 1)
        self._turns |= {*ends, *places}
        start = max((n for n in self._turns if n < min(ends)), default=0)
        self._latest = {start, *ends}
        possible = {n for n in (*ends, *places, *regular) if least <= n <= end}
        kept = self._thinned({*self._checkpoints, *possible}, end, self._max_checkpoints)
        self._forget_all_but(kept)
        self._make(possible.intersection(kept) | {n for n in regular if n > end})

    def add_checkpoint(self, place: int) -> None:
        """Let passes make a checkpoint at this length, too."""
        if self.needs_checkpoints:
            self._turns.add(place)
            self._make({n for n in (*self._lengths, place) if n >= self.length})

    def _make(self, lengths: Collection[int]) -> None:
        """Make checkpoints at these lengths. The present one may be among them."""
        self._lengths = sorted(lengths)
        for layer in self.layers:
            layer.checkpoint_at(self._lengths)
        self._note_checkpoints(self.length)

    def _note_checkpoints(self, start: int) -> None:
        """Note checkpoints from `start` to the present length, and forget those that help least."""
        new = {n for n in self._lengths if start <= n <= self.length}
        if new:  # not after most decoded tokens
            self._checkpoints = sorted({*self._checkpoints, *new})
            limit = self._max_checkpoints
            self._forget_all_but(self._thinned(self._checkpoints, self.length, limit))

    def _thinned(self, checkpoints: Collection[int], length: int, limit: int) -> list[int]:
        return kept_checkpoints(
            checkpoints, length, limit, self._spacing, latest=self._latest, turns=self._turns
        )

    def _forget_all_but(self, kept: Collection[int]) -> None:
        for length in set(self._checkpoints).difference(kept):
            self._checkpoints.remove(length)
            for layer in self.layers:
                layer.forget(length)

    def positions(self, tokens: int) -> slice:
        return slice(self.length, self.length + tokens)

    def pieces(self, layer: int) -> Sequence[tuple[slice, LayerCache]]:
        return [(slice(None), self.layers[layer])]

    def advance(self, tokens: int) -> None:
        for layer in self.layers:
            layer.advance(tokens)
        self.length += tokens
        if self.needs_checkpoints:
            self._note_checkpoints(self.length - tokens + 1)

    def fill(self, tokens: int, dtype: torch.dtype) -> None:
        """Add T random tokens of a model of this type."""
        for layer in self.layers:
            layer.fill(tokens, dtype)
        self.advance(tokens)

    def cut(self, length: int) -> None:
        assert self.usable(length) == length
        for layer in self.layers:
            layer.cut(length)
        self._checkpoints = [n for n in self._checkpoints if n <= length]
        self._turns &= {*self._checkpoints}
        self.length = length
        self._lengths = []

    def set_extent(self, extent: Extent) -> None:
        """Note what the layers hold, after each was filled."""
        self.length = extent.tokens
        self._checkpoints = [*extent.checkpoints]
        self._turns = {*extent.checkpoints}
        self._latest = set()

    def copy_from(self, cache: SequenceCache, length: int) -> None:
        """Hold the first tokens of another cache of the same form."""
        self.clear()
        extent = cache.extent.until(length)
        for mine, theirs in zip(self.layers, cache.layers, strict=True):
            mine.copy_from(theirs, extent)
        self.set_extent(extent)


def new_caches(
    config: ModelConfig,
    capacity: int,
    dtype: torch.dtype,
    on: Sequence[torch.device],
    bits: Bits | None = None,
    count: int = 1,
    checkpoints: int | None = None,
) -> list[SequenceCache]:
    """Return caches for `count` sequences, of the fastest kinds for layers on these devices.

    bits: of keys and values, None for the bits of `dtype`. checkpoints: of states, for each
    sequence, None for the usual ones.
    """
    caches = [_layers(config, capacity, dtype, on, bits) for _ in range(count)]
    if checkpoints is None:
        checkpoints, *_ = checkpoint_counts(bytes_of_states(config), count)
    return [SequenceCache(config, capacity, layers, checkpoints) for layers in caches]


def _layers(
    config: ModelConfig,
    capacity: int,
    dtype: torch.dtype,
    on: Sequence[torch.device],
    bits: Bits | None,
) -> list[LayerCache]:
    layers: dict[int, LayerCache] = {}
    has_kernels = not gpu.is_gpu(on[0]) and dtype != torch.float16 and kernels_available()
    shapes = {}
    for layer, device in enumerate(on):
        if states := state_shapes(config, layer):
            layers[layer] = StateCache(states, device, has_steps=has_kernels)
        else:
            shapes[layer] = kv_shape(config, layer, bits or bits_of(dtype))
    windows = {layer: config.window(layer) for layer in shapes}
    if gpu.is_gpu(on[0]):
        # Triton is imported only if a GPU computes.
        from mixchat.engine.caches.device_cache import device_caches

        devices = {layer: on[layer] for layer in shapes}
        layers |= device_caches(shapes, capacity, windows, dtype, devices)
    elif has_kernels:
        for layer, shape in shapes.items():
            layers[layer] = PagedKVCache(shape, capacity, windows[layer])
    else:
        masks = Masks()
        for layer, shape in shapes.items():
            layers[layer] = TensorKVCache(shape, capacity, windows[layer], dtype, masks)
    return [layers[layer] for layer in range(len(on))]


def kv_shape(config: ModelConfig, layer: int, bits: Bits) -> CacheShape:
    """Return the shape of a layer's keys and values."""
    heads, groups, width = config.attention_shape(layer)
    if config.mixer(layer) != "latent_attention":
        return CacheShape(heads, groups, width, bits)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    return CacheShape(heads, 1, width, bits, config.kv_lora_rank, config.latent_scale)


def state_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a layer's state, none if the layer has keys and values.

    "conv" has the last inputs of a convolution.
    """
    mixer = config.mixer(layer)
    if mixer == "conv":
        return {"conv": (config.conv_L_cache - 1, config.hidden_size)}
    if mixer == "linear_attention":
        shape = DeltaNetShape(*config.delta_net_shape)
        taps = config.linear_conv_kernel_dim
    elif mixer == "mamba":
        shape = DeltaNetShape(*config.mamba_shape)
        taps = config.mamba_d_conv
    else:
        return {}
    return {"conv": (taps - 1, shape.channels), "state": shape.state_shape}


def cache_bytes(
    config: ModelConfig,
    capacity: int,
    dtype: torch.dtype,
    bits: Bits | None = None,
    count: int = 1,
    checkpoints: int | None = None,
) -> int:
    """Return the bytes that the full caches of `count` sequences take. Options as `new_caches`."""
    rooms = _kv_bytes(config, bits or bits_of(dtype), lambda window: room_of(capacity, window))
    state = bytes_of_states(config)
    if checkpoints is None:
        checkpoints, *_ = checkpoint_counts(state, count)
    # A pass reads a state and writes another one.
    return count * (rooms + state * (2 + checkpoints))


def scratch_bytes(config: ModelConfig) -> int:
    """Return the bytes that the splits of a token's attention take on each GPU."""
    layers = range(config.num_hidden_layers)
    shapes = [kv_shape(config, layer, 16) for layer in layers if not state_shapes(config, layer)]
    numbers = (token_scratch(shape.heads, shape.groups, shape.value_dim) for shape in shapes)
    return torch.float32.itemsize * max(numbers, default=0)


def bytes_seen(
    config: ModelConfig, tokens: int, dtype: torch.dtype, bits: Bits | None = None
) -> int:
    """Return the bytes that a token after `tokens` earlier ones reads, or writes to states."""
    seen = _kv_bytes(config, bits or bits_of(dtype), lambda window: min(tokens, window or tokens))
    return seen + 2 * bytes_of_states(config)


def _kv_bytes(config: ModelConfig, bits: Bits, tokens_of: Callable[[int | None], int]) -> int:
    """Return the bytes of keys and values, for the tokens of layers with each window."""
    layers = range(config.num_hidden_layers)
    return sum(
        tokens_of(config.window(layer)) * token_bytes(kv_shape(config, layer, bits))
        for layer in layers
        if not state_shapes(config, layer)
    )


def bytes_of_states(config: ModelConfig) -> int:
    """Return the bytes of a checkpoint, 0 for a model without states."""
    layers = range(config.num_hidden_layers)
    return sum(state_bytes(state_shapes(config, layer)) for layer in layers)


def bits_of(dtype: torch.dtype) -> Bits:
    """Return the bits of a number in a cache of this type."""
    return 32 if dtype == torch.float32 else 16
