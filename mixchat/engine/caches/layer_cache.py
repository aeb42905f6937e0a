"""The contract of what a layer keeps of the tokens of one sequence.

Keys and values, a window of them, latents, and recurrent states keep it. Layers of different kinds
may follow each other in any order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.safetensors import TensorSpec


@dataclass(frozen=True)
class Extent:
    """The tokens that the caches of a sequence's layers hold, or those in a file.

    first: layers with a window have no earlier tokens. checkpoints: the counts of tokens, in order,
    that layers with a state can be cut to, besides 0 and all.
    """

    tokens: int = 0
    first: int = 0
    checkpoints: tuple[int, ...] = ()

    def until(self, tokens: int) -> Extent:
        """Return the extent of the first `tokens`."""
        return Extent(tokens, self.first, tuple(n for n in self.checkpoints if n < tokens))


class LayerCache(ABC):
    """What a layer keeps of `length` tokens.

    A pass adds tokens to the layers, one after the other, and `advance` counts them at the end. An
    interrupted pass leaves each cache as it was.
    """

    needs_checkpoints = False  # whether it can be cut to checkpoints alone
    has_steps = False  # whether the program that decodes one token can use it

    def __init__(self) -> None:
        self.length = 0

    @property
    @abstractmethod
    def form(self) -> str:
        """Return the name of the form. Content fits into caches of the same form."""

    @property
    def first(self) -> int:
        """Return the first token that the layer keeps."""
        return 0

    def usable(self, length: int, extent: Extent) -> int:
        """Return the most tokens, up to `length`, that content of this extent can be cut to."""
        return length

    def advance(self, tokens: int) -> None:
        """Count new tokens, after all layers have added them."""
        self.length += tokens

    @abstractmethod
    def fill(self, tokens: int, dtype: torch.dtype) -> None:
        """Add T random tokens of a model of this type, which `advance` is still to count.

        Measurements need long texts, and computing them would take minutes.
        """

    def cut(self, length: int) -> None:
        """Forget all but the first tokens. `length` is usable."""
        self.length = length

    def checkpoint_at(self, lengths: Collection[int]) -> None:
        """Make a checkpoint of the present length if it is among these lengths.

        Passes make the others as they reach them. Most kinds of cache need none.
        """
        assert not self.needs_checkpoints

    def forget(self, length: int) -> None:
        """Give the checkpoint of this length back."""
        assert not self.needs_checkpoints

    @abstractmethod
    def clear(self) -> None:
        """Empty the cache. All but a GPU's gives its memory back."""

    @abstractmethod
    def specs(self, extent: Extent) -> list[TensorSpec]:
        """Return the specs of `content`."""

    @abstractmethod
    def content(self, extent: Extent) -> dict[str, torch.Tensor]:
        """Return a copy on the CPU of what the layer keeps of an extent that it holds."""

    def restore(self, content: dict[str, torch.Tensor], extent: Extent, length: int) -> None:
        """Put content of an extent, cut to a length that is usable, into an empty cache.

        Raises `CheckpointError` if the content has another form.
        """
        assert self.length == 0
        forms = {name: (tensor.dtype, tensor.shape) for name, tensor in content.items()}
        if forms != {spec.name: (spec.dtype, spec.shape) for spec in self.specs(extent)}:
            raise CheckpointError("the saved part of a layer does not fit its cache")
        self._restore(content, extent, length)
        self.length = length

    @abstractmethod
    def _restore(self, content: dict[str, torch.Tensor], extent: Extent, length: int) -> None: ...

    def copy_from(self, cache: LayerCache, extent: Extent) -> None:
        """Hold the tokens of an extent that another cache of the same form holds."""
        self.restore(cache.content(extent), extent, extent.tokens)
