"""The parts of an installed model, each made of a few matrices of the checkpoint.

Only one is in memory. An expert has two, `w13` (of w1 and w3), and `w2` with the zeros that follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mixchat.base.safetensors import TensorSpec
from mixchat.weights.format.blueprint import (
    EMBEDDING,
    HEAD,
    SHARED_FILE,
    Blueprint,
    experts_file,
    layer_prefix,
)
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import Inputs
from mixchat.weights.source.checkpoint_index import CheckpointIndex, Read, expert_tensor


@dataclass(frozen=True)
class ModelPart:
    """Consecutive tensors in `file`, and the checkpoint's matrices they are made of.

    `linear` is None for tensors that are never quantized. `expert` is a layer and an expert's
    number.
    """

    file: str
    tensors: tuple[TensorSpec, ...]
    sources: tuple[str, ...]
    linear: LinearSpec | None = None
    expert: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)

    def components(self, index: CheckpointIndex) -> list[str]:
        """Return the checkpoint's tensors that have to be read."""
        return [name for source in self.sources for name in index.components(source)]

    def make(self, index: CheckpointIndex, read: Read) -> list[torch.Tensor]:
        """Return the tensors of this part. Raises `CheckpointError` if a weight is not finite."""
        linear = self.linear
        if linear is None:
            return [self.dense(index, read)]
        if {index.quant_type(source) for source in self.sources} == {linear.quant_type}:
            matrices = [index.read_4bit(source, read) for source in self.sources]
            return self._padded(linear.stack_quantized(matrices))
        return self.encoded(self.dense(index, read))

    def dense(self, index: CheckpointIndex, read: Read) -> torch.Tensor:
        """Return the checkpoint's matrices, one above the other."""
        if self.linear is None:
            return index.read_dense(self.sources[0], read).to(self.tensors[0].dtype)
        return self._stacked(self.linear, index, read)

    def encoded(self, weight: torch.Tensor, inputs: Inputs | None = None) -> list[torch.Tensor]:
        assert self.linear is not None
        return self._padded(self.linear.encode(weight, inputs))

    def _padded(self, made: list[torch.Tensor]) -> list[torch.Tensor]:
        padding = [torch.zeros(spec.shape, dtype=spec.dtype) for spec in self.tensors[len(made) :]]
        return made + padding

    def _stacked(self, linear: LinearSpec, index: CheckpointIndex, read: Read) -> torch.Tensor:
        if len(self.sources) == 1:
            only = index.read_dense(self.sources[0], read)
            # From 16 bits, as `mixchat convert` does, so that `repair` gives the same bytes.
            return only.to(linear.dtype) if linear.quant_type == "int8" else only
        whole = torch.empty((linear.rows, linear.columns), dtype=linear.dtype)
        start = 0
        for source in self.sources:
            matrix = index.read_dense(source, read)
            whole[start : start + len(matrix)] = matrix
            start += len(matrix)
        return whole


def model_parts(blueprint: Blueprint) -> Iterator[ModelPart]:
    """Yield all parts of the model, in their order on disk."""
    yield _plain(blueprint.embedding)
    for layer in range(blueprint.config.num_hidden_layers):
        prefix = layer_prefix(layer)
        before_attention, before_experts = blueprint.norms(layer)
        qkv = tuple(f"{prefix}self_attn.{name}_proj.weight" for name in "qkv")
        yield _plain(before_attention)
        yield _plain(before_experts)
        yield _linear(SHARED_FILE, blueprint.qkv(layer), qkv)
        yield _linear(SHARED_FILE, blueprint.o(layer), (f"{prefix}self_attn.o_proj.weight",))
        yield _plain(blueprint.gate(layer))
    yield _plain(blueprint.norm)
    if blueprint.head is not None:
        tied = blueprint.config.tie_word_embeddings
        yield _linear(SHARED_FILE, blueprint.head, (EMBEDDING if tied else f"{HEAD}.weight",))
    for layer in range(blueprint.config.num_hidden_layers):
        for expert in range(blueprint.config.num_local_experts):
            yield from _expert(blueprint, layer, expert)


def _plain(spec: TensorSpec) -> ModelPart:
    return ModelPart(SHARED_FILE, (spec,), (spec.name,))


def _linear(file: str, linear: LinearSpec, sources: tuple[str, ...]) -> ModelPart:
    return ModelPart(file, tuple(linear.tensors), sources, linear)


def _expert(blueprint: Blueprint, layer: int, expert: int) -> Iterator[ModelPart]:
    layout, file = blueprint.expert_of(layer), experts_file(layer)
    specs = tuple(layout.tensors(expert))
    cut = len(layout.gate_up.tensors)
    w1, w2, w3 = (expert_tensor(layer, expert, name) for name in ("w1", "w2", "w3"))
    yield ModelPart(file, specs[:cut], (w1, w3), layout.gate_up, (layer, expert))
    yield ModelPart(file, specs[cut:], (w2,), layout.down, (layer, expert))
