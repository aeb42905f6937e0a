"""The parts of an installed model, each made of a few matrices of the checkpoint.

Only one is in memory. An expert has two, `w13` (of w1 and w3), and `w2` with the zeros that follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from mixchat.base.safetensors import TensorSpec
from mixchat.weights.families.family import Slice
from mixchat.weights.families.read_config import slices
from mixchat.weights.format.blueprint import SHARED_FILE, Blueprint, expert_prefix, experts_file
from mixchat.weights.matrix.bnb_format import Quantized4bit
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import Inputs
from mixchat.weights.source.checkpoint_index import CheckpointIndex, Read


@dataclass(frozen=True)
class ModelPart:
    """Consecutive tensors in `file`, and the slices of the checkpoint's matrices that make them.

    `linear` is None for tensors that are never quantized. `expert` is a layer and an expert's
    number.
    """

    file: str
    tensors: tuple[TensorSpec, ...]
    sources: tuple[Slice, ...]
    linear: LinearSpec | None = None
    expert: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)

    def components(self, index: CheckpointIndex) -> list[str]:
        """Return the checkpoint's tensors that have to be read."""
        return [name for matrix in self.matrices for name in index.components(matrix)]

    @property
    def matrices(self) -> list[str]:
        """Return the names of the checkpoint's matrices, each once."""
        return [*dict.fromkeys(source.name for source in self.sources)]

    def make(self, index: CheckpointIndex, read: Read) -> list[torch.Tensor]:
        """Return the tensors of this part. Raises `CheckpointError` if a weight is not finite."""
        linear = self.linear
        if linear is None:
            return [self.dense(index, read)]
        if {index.quant_type(matrix) for matrix in self.matrices} == {linear.quant_type}:
            matrices = [_read_4bit(source, index, read) for source in self.sources]
            return self._padded(linear.stack_quantized(matrices))
        return self.encoded(self.dense(index, read))

    def dense(self, index: CheckpointIndex, read: Read) -> torch.Tensor:
        """Return the checkpoint's matrices, one above the other."""
        if self.linear is None:
            (only,) = self._read(index, read)
            return only.to(self.tensors[0].dtype)
        return self._stacked(self.linear, index, read)

    def encoded(self, weight: torch.Tensor, inputs: Inputs | None = None) -> list[torch.Tensor]:
        assert self.linear is not None
        return self._padded(self.linear.encode(weight, inputs))

    def _padded(self, made: list[torch.Tensor]) -> list[torch.Tensor]:
        padding = [torch.zeros(spec.shape, dtype=spec.dtype) for spec in self.tensors[len(made) :]]
        return made + padding

    def _stacked(self, linear: LinearSpec, index: CheckpointIndex, read: Read) -> torch.Tensor:
        if self.is_one_matrix:
            (only,) = self._read(index, read)
            # From 16 bits, as `mixchat convert` does, so that `repair` gives the same bytes.
            return only.to(linear.dtype) if linear.quant_type == "int8" else only
        whole = torch.empty((linear.rows, linear.columns), dtype=linear.dtype)
        start = 0
        for piece in self._read(index, read):
            whole[start : start + len(piece)] = piece
            start += len(piece)
        return whole

    @property
    def is_one_matrix(self) -> bool:
        """Return whether it is made of one matrix as it is stored."""
        return len(self.sources) == 1 and self.sources[0].is_whole

    def _read(self, index: CheckpointIndex, read: Read) -> Iterator[torch.Tensor]:
        """Yield the slices. A matrix that two of them share is read once."""
        for name, sources in groupby(self.sources, lambda source: source.name):
            matrix = index.read_dense(name, read)
            yield from (_cut(matrix, source) for source in sources)


def model_parts(blueprint: Blueprint) -> Iterator[ModelPart]:
    """Yield all parts of the model, in their order on disk."""
    sources = slices(blueprint.config)

    def plain(spec: TensorSpec) -> ModelPart:
        return ModelPart(SHARED_FILE, (spec,), sources[spec.name])

    def matrix(linear: LinearSpec) -> ModelPart:
        made_of = sources[f"{linear.name}.weight"]
        return ModelPart(SHARED_FILE, tuple(linear.tensors), made_of, linear)

    yield plain(blueprint.embedding)
    for layer in range(blueprint.config.num_hidden_layers):
        for norm in blueprint.norms(layer):
            yield plain(norm)
        yield matrix(blueprint.qkv(layer))
        yield matrix(blueprint.o(layer))
        yield plain(blueprint.gate(layer))
    yield plain(blueprint.norm)
    if blueprint.head is not None:
        yield matrix(blueprint.head)
    for layer in range(blueprint.config.num_hidden_layers):
        for expert in range(blueprint.config.num_local_experts):
            yield from _expert(blueprint, layer, expert)


def _expert(blueprint: Blueprint, layer: int, expert: int) -> Iterator[ModelPart]:
    layout, file = blueprint.expert_of(layer), experts_file(layer)
    specs = tuple(layout.tensors(expert))
    cut = len(layout.gate_up.tensors)
    for linear, tensors in ((layout.gate_up, specs[:cut]), (layout.down, specs[cut:])):
        sources = slices(blueprint.config)[f"{expert_prefix(layer, expert)}{linear.name}.weight"]
        yield ModelPart(file, tensors, sources, linear, (layer, expert))


def _cut(matrix: torch.Tensor, source: Slice) -> torch.Tensor:
    if source.transposed:
        matrix = matrix.T
    if source.rows is not None:
        matrix = matrix[source.rows.start : source.rows.stop : source.rows.step]
    return matrix if source.factor == 1 else matrix.float() * source.factor


def _read_4bit(source: Slice, index: CheckpointIndex, read: Read) -> Quantized4bit:
    assert source.rows is None
    assert not source.transposed
    matrix = index.read_4bit(source.name, read)
    return replace(matrix, absmax=matrix.absmax * source.factor)
