"""The parts of an installed model, each made of a few matrices of the checkpoint.

The checkpoint's index tells which ones.

One part at a time is in memory. An expert has two parts, `w13` (of w1 and w3), and `w2` with the
zeros that follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mixchat.base.safetensors import TensorSpec
from mixchat.install.source.checkpoint_index import CheckpointIndex, Read
from mixchat.weights.families.family import Slice, expert_prefix, layer_prefix
from mixchat.weights.format.blueprint import SHARED_FILE, Blueprint, experts_file
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.nf4 import Quantized4bit
from mixchat.weights.matrix.quant_type import Inputs


@dataclass(frozen=True)
class ModelPart:
    """Consecutive tensors in `file` that make the matrix or vector `name`."""

    file: str
    tensors: tuple[TensorSpec, ...]
    name: str
    linear: LinearSpec | None = None  # the stored form, None if never quantized
    expert: tuple[int, int] | None = None  # its layer and its number
    bias: str | None = None  # the name of the matrix's bias

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)

    def components(self, index: CheckpointIndex) -> list[str]:
        """Return the checkpoint's tensors that have to be read."""
        biases = dict.fromkeys(source.name for source in self._bias(index))
        matrices = self.matrices(index)
        return [name for matrix in matrices for name in index.components(matrix)] + [*biases]

    def matrices(self, index: CheckpointIndex) -> list[str]:
        """Return the names of the checkpoint's matrices, each once."""
        return [*dict.fromkeys(source.name for source in index.slices(self.name))]

    def make(self, index: CheckpointIndex, read: Read) -> list[torch.Tensor]:
        """Return the tensors of this part. Raises `CheckpointError` if a weight is not finite."""
        linear = self.linear
        if linear is None:
            return [self.dense(index, read)]
        bias = self.read_bias(index, read)
        sources = index.slices(self.name)
        have_type = {index.quant_type(source.name) for source in sources} == {linear.quant_type}
        # A block of codes has columns of one row, so columns cannot be cut.
        if have_type and all(source.columns is None for source in sources):
            matrices = [*_read_4bit(sources, index, read)]
            return self._padded(linear.stack_quantized(matrices, bias))
        return self.encoded(self.dense(index, read), bias=bias)

    def dense(self, index: CheckpointIndex, read: Read) -> torch.Tensor:
        """Return the checkpoint's matrices, one above the other, [R, C]."""
        linear = self.linear
        pieces = _read(index.slices(self.name), index, read)
        if linear is None:
            spec, (first, *others) = self.tensors[0], pieces
            whole = torch.cat([first, *others]) if others else first
            return whole.to(spec.dtype).view(spec.shape)
        if self.is_one_matrix(index):
            only = next(pieces)
            # int8 encodes 16-bit numbers, as it gets them from a matrix of several pieces.
            return only.to(linear.dtype) if linear.quant_type == "int8" else only
        whole = torch.empty((linear.rows, linear.columns), dtype=linear.dtype)
        start = 0
        for piece in pieces:
            whole[start : start + len(piece)] = piece
            start += len(piece)
        return whole

    def read_bias(self, index: CheckpointIndex, read: Read) -> torch.Tensor | None:
        """Return the bias of the matrix [R], if it has one."""
        bias = self._bias(index)
        return torch.cat([*_read(bias, index, read)]) if bias else None

    def encoded(
        self, weight: torch.Tensor, inputs: Inputs | None = None, bias: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        assert self.linear is not None
        return self._padded(self.linear.encode(weight, inputs, bias))

    def _padded(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        padding = [
            torch.zeros(spec.shape, dtype=spec.dtype) for spec in self.tensors[len(tensors) :]
        ]
        return tensors + padding

    def is_one_matrix(self, index: CheckpointIndex) -> bool:
        """Return whether the part is one matrix of the checkpoint, whole and unchanged."""
        sources = index.slices(self.name)
        return len(sources) == 1 and sources[0].is_whole

    def _bias(self, index: CheckpointIndex) -> tuple[Slice, ...]:
        return index.slices(self.bias) if self.bias else ()


def model_parts(blueprint: Blueprint) -> Iterator[ModelPart]:
    """Yield all parts of the model, in their order on disk."""
    matrices = {linear.tensors[0].name: linear for linear in blueprint.shared_matrices.values()}
    specs = blueprint.shared_tensors()
    for spec in specs:
        if linear := matrices.get(spec.name):
            own = (spec, *itertools.islice(specs, len(linear.tensors) - 1))
            yield _matrix(SHARED_FILE, own, linear)
        else:
            yield ModelPart(SHARED_FILE, (spec,), spec.name)
    for layer in range(blueprint.config.num_moe_layers):
        for expert in range(blueprint.config.num_local_experts):
            yield from _expert(blueprint, layer, expert)


def _expert(blueprint: Blueprint, layer: int, expert: int) -> Iterator[ModelPart]:
    form = blueprint.expert_of(layer)
    file = experts_file(layer)
    prefix = layer_prefix(blueprint.config.first_k_dense_replace + layer)
    specs = tuple(form.tensors(expert))
    cut = len(form.gate_up.tensors)
    for linear, tensors in ((form.gate_up, specs[:cut]), (form.down, specs[cut:])):
        part = _matrix(file, tensors, linear, expert_prefix(prefix, expert))
        yield replace(part, expert=(layer, expert))


def _matrix(
    file: str, tensors: tuple[TensorSpec, ...], linear: LinearSpec, prefix: str = ""
) -> ModelPart:
    name = f"{prefix}{linear.name}"
    bias = f"{name}.bias" if linear.bias else None
    return ModelPart(file, tensors, f"{name}.weight", linear, bias=bias)


def _read(sources: Sequence[Slice], index: CheckpointIndex, read: Read) -> Iterator[torch.Tensor]:
    """Yield the slices. A matrix that two of them share is read once."""
    for name, shared in itertools.groupby(sources, lambda source: source.name):
        matrix = index.read_dense(name, read)
        yield from (_cut(matrix, source) for source in shared)


def _read_4bit(
    sources: Sequence[Slice], index: CheckpointIndex, read: Read
) -> Iterator[Quantized4bit]:
    for name, shared in itertools.groupby(sources, lambda source: source.name):
        matrix = index.read_4bit(name, read)
        yield from (_cut_4bit(matrix, source) for source in shared)


def _cut(matrix: torch.Tensor, source: Slice) -> torch.Tensor:
    if source.transposed:
        matrix = matrix.T
    if source.rows is not None:
        matrix = matrix[source.rows.start : source.rows.stop : source.rows.step]
    if source.columns is not None:
        matrix = torch.cat([matrix[:, x.start : x.stop : x.step] for x in source.columns], dim=1)
    if source.exponentials:
        matrix = (-matrix.float()).log()
    if source.factor == 1 and source.added == 0:
        return matrix
    return matrix.float() * source.factor + source.added


def _cut_4bit(matrix: Quantized4bit, source: Slice) -> Quantized4bit:
    """Return a slice of a matrix that is already transposed if need be."""
    cut = matrix if source.rows is None else matrix.cut(source.rows)
    return cut if source.factor == 1 else replace(cut, absmax=cut.absmax * source.factor)
