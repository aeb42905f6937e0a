"""The tensors of which a model is built, and what a description makes of those of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import TensorSpec
from mixchat.engine.layers.operations import Product, RMSNorm, Rows
from mixchat.engine.layers.rope import RotaryEmbedding
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.expert import Expert, ExpertSpec
from mixchat.weights.format.mixers import MixerSpec
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


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer, which `used` names. rope: None if the layer rotates nothing."""

    number: int
    used: Blueprint
    model: ModelTensors
    rope: RotaryEmbedding | None

    @property
    def config(self) -> ModelConfig:
        return self.used.config

    @property
    def mixer(self) -> MixerSpec:
        return self.used.mixer(self.number)

    def norm(self, spec: TensorSpec, eps: float | None = None) -> RMSNorm:
        """Return a norm. eps: keeps it from dividing by 0, None for the model's number."""
        eps = self.config.rms_norm_eps if eps is None else eps
        return RMSNorm(self.model.tensor(spec), eps)

    def product(self, out: Rows, x: Rows, matrix: LinearSpec) -> Product:
        return Product(out, x, self.model.linear(matrix), matrix.name)

    def mix(self, out: Rows, x: Rows, role: str) -> Product:
        """Return the product with a matrix of the mixer."""
        return self.product(out, x, self.mixer.matrices[role])
