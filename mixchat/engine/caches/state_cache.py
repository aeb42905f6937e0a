"""The recurrent state of a layer, with checkpoints, because a state cannot be cut back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import TypeAlias

import torch

from mixchat.base.safetensors import TensorSpec
from mixchat.engine.caches.layer_cache import Extent, LayerCache

State: TypeAlias = dict[str, torch.Tensor]
"""The tensors of a layer's state after some tokens, fp32. It is all zeros before the first."""

# (the rows of a pass, the state before them, where the state after them is written).
Segment: TypeAlias = tuple[slice, State, State]


class StateCache(LayerCache):
    """The state after `length` tokens, and after the tokens of each checkpoint.

    A pass reads one state and writes another one, so that an interruption changes nothing. States
    of checkpoints are never written again. Take a pass of 1,000 tokens after 500, which is to make
    a checkpoint of 1,024 tokens. It has the segments 0 to 524 and 524 to 1,000.
    """

    needs_checkpoints = True

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], device: torch.device, *, has_steps: bool
    ) -> None:
        super().__init__()
        self._shapes = dict(shapes)
        self._device = device
        self.has_steps = has_steps
        self.clear()

    @property
    def form(self) -> str:
        return "states"

    def clear(self) -> None:
        self.length = 0
        self._checkpoints: dict[int, State] = {}
        self._current: State | None = None
        self._is_private = True  # whether nothing but `_current` has the current state
        self._spare: State | None = None  # memory for the next state
        self._lengths: set[int] = set()  # of checkpoints that the next pass makes
        self._written: dict[int, State] = {}  # by a pass that has not ended

    def usable(self, length: int, extent: Extent) -> int:
        if length == extent.tokens:
            return length
        return max((count for count in extent.checkpoints if count <= length), default=0)

    def checkpoint_at(self, lengths: Collection[int]) -> None:
        self._lengths = set(lengths)
        if self.length in self._lengths:
            self._checkpoints[self.length] = self._published(self.length)

    def forget(self, length: int) -> None:
        del self._checkpoints[length]

    @property
    def state(self) -> State:
        """Return the state after `length` tokens, which nobody may change."""
        if self._current is None:
            self._current = self._new()
            self._is_private = True
        return self._current

    def segments(self, tokens: int) -> Iterator[Segment]:
        """Yield the parts of a pass of T tokens, each with the states before and after it.

        The caller writes each state before it asks for the next part.
        """
        end = self.length + tokens
        stops = sorted(length for length in self._lengths if self.length < length < end)
        self._written = {}
        before = self.state
        for start, stop in pairwise([self.length, *stops, end]):
            after = self._new() if stop < end or self._spare is None else self._spare
            yield slice(start - self.length, stop - self.length), before, after
            self._written[stop] = before = after
        self._spare = before

    def fill(self, tokens: int, dtype: torch.dtype) -> None:
        for _, _, after in self.segments(tokens):
            for tensor in after.values():
                tensor.normal_()

    def advance(self, tokens: int) -> None:
        old = self._current if self._is_private else None
        end = self.length + tokens
        written = {n: state for n, state in self._written.items() if n in self._lengths}
        self._checkpoints |= written
        self._current = self._written[end]
        self._is_private = end not in written
        self._spare = old
        self._written = {}
        self.length = end

    def cut(self, length: int) -> None:
        if length != self.length:
            self._current = self._checkpoints[length] if length else None
            self._is_private = False
        self._checkpoints = {n: state for n, state in self._checkpoints.items() if n <= length}
        self._lengths = set()
        self.length = length

    def specs(self, extent: Extent) -> list[TensorSpec]:
        """Return specs of each state tensor, for all checkpoints and the last state [n, ...]."""
        count = len(extent.checkpoints) + 1
        return [
            TensorSpec(name, torch.float32, (count, *shape)) for name, shape in self._shapes.items()
        ]

    def content(self, extent: Extent) -> dict[str, torch.Tensor]:
        states = [self._published(count) for count in (*extent.checkpoints, extent.tokens)]
        return {name: torch.stack([state[name].cpu() for state in states]) for name in self._shapes}

    def _restore(self, content: dict[str, torch.Tensor], extent: Extent, length: int) -> None:
        for index, count in enumerate((*extent.checkpoints, extent.tokens)):
            if count <= length:
                self._checkpoints[count] = state = self._new()
                for name, tensor in state.items():
                    tensor.copy_(content[name][index])
        self._current = self._checkpoints.pop(length)

    def copy_from(self, cache: LayerCache, extent: Extent) -> None:
        # Both caches have the same memory, which neither writes to again.
        assert isinstance(cache, StateCache)
        self._checkpoints = {count: cache._published(count) for count in extent.checkpoints}
        self._current = cache._published(extent.tokens)
        self._is_private = False
        self.length = extent.tokens

    def _published(self, length: int) -> State:
        """Return the state after so many tokens, whose memory is not used again."""
        if length != self.length:
            return self._checkpoints[length]
        self._is_private = False
        return self.state

    def _new(self) -> State:
        return {
            name: torch.zeros(shape, device=self._device) for name, shape in self._shapes.items()
        }


def state_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the bytes of a state."""
    return 4 * sum(map(prod, shapes.values()))
