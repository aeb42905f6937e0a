"""The tensors of which a model is built."""

from __future__ import annotations

from typing import Protocol

import torch

from mixchat.base.safetensors import TensorSpec
from mixchat.weights.format.expert import Expert, ExpertSpec
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import Linear


class ModelTensors(Protocol):
    """The tensors of a model on the device that computes it."""

    def tensor(self, spec: TensorSpec) -> torch.Tensor: ...

    def linear(self, spec: LinearSpec) -> Linear:
        """Return a matrix."""

    def parts(self, spec: LinearSpec, count: int) -> list[Linear]:
        """Return a matrix as `count` matrices, which lie one above the other."""

    def expert(self, spec: ExpertSpec) -> Expert:
        """Return a layer's dense part, which has the form of an expert."""
