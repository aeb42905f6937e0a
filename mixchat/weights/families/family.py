"""The form of a family's description."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from mixchat.base.model_config import ModelConfig


@dataclass(frozen=True)
class Slice:
    """A part of a checkpoint's tensor, turned if it is `transposed`, times `factor`.

    name: of the tensor, or `X[3]` for the fourth part of a stacked tensor X.
    shape: of what `name` names, as it is stored.
    rows: of the tensor after it is turned, all if None.
    """

    name: str
    shape: tuple[int, ...]
    rows: range | None = None
    transposed: bool = False
    factor: float = 1.0

    @property
    def is_whole(self) -> bool:
        """Return whether it is the tensor as it is stored."""
        return self.rows is None and not self.transposed and self.factor == 1


Tensors: TypeAlias = Iterator[tuple[str, tuple[Slice, ...]]]
"""The name of each tensor of an installed model, and the slices above each other that make it."""


@dataclass(frozen=True)
class Family:
    """A family of models, by config.json's `model_type`.

    read_config: reads a config.json. Raises `CheckpointError`.
    tensors: says how the installed model's tensors are made of a checkpoint's. Expert 3 of layer 0
    has `model.layers.0.block_sparse_moe.experts.3.w13.weight`, and `w2`.
    """

    model_type: str
    read_config: Callable[[dict[str, Any]], ModelConfig]
    tensors: Callable[[ModelConfig], Tensors]
