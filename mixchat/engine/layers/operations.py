"""The operations of which a layer's description is a list.

A description reads from top to bottom, like the formulas of a paper. It names buffers and says
nothing of devices or of the count of rows. Executors compute it: `compute.py` one operation after
the other for any rows, `program.py` as a CPU's program, and `graph.py` as a GPU's kernels.

T = rows of a pass, D = hidden_size, H = heads, h = columns of a head, K = num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import prod

import torch

from mixchat.engine.layers.rope import RotaryEmbedding
from mixchat.experts.holder import ExpertRunner
from mixchat.kernels.cpu.convolution import Convolution
from mixchat.kernels.cpu.delta_net import DeltaRule
from mixchat.kernels.cpu.router import Router
from mixchat.kernels.cpu.rows import RowKernel, rms_norm
from mixchat.weights.matrix.quant_type import Linear


@dataclass(frozen=True)
class Rows:
    """The T rows of a buffer, or some of their numbers: columns, or heads of columns.

    size: numbers of a row of the buffer. shape: (columns,) or (heads, columns) of a row. first: the
    first of these numbers. stride: numbers from one head to the next. dtype: None for the type of
    hidden states. `Rows.new("qkv", 3, 4)[1:]` is `Rows("qkv", 12, (2, 4), first=4, stride=4)`.
    """

    name: str
    size: int
    shape: tuple[int, ...]
    first: int = 0
    stride: int = 0
    dtype: torch.dtype | None = None

    @classmethod
    def new(cls, name: str, *shape: int, dtype: torch.dtype | None = None) -> Rows:
        """Return all numbers of a buffer."""
        return cls(name, prod(shape), shape, stride=shape[-1], dtype=dtype)

    def __getitem__(self, selected: slice) -> Rows:
        """Return some heads, or some columns if there are no heads."""
        start, stop, _ = selected.indices(self.shape[0])
        step = self.stride if len(self.shape) == 2 else 1
        return replace(self, shape=(stop - start, *self.shape[1:]), first=self.first + start * step)

    def columns(self, selected: slice) -> Rows:
        """Return some columns of each head."""
        start, stop, _ = selected.indices(self.shape[-1])
        return replace(self, shape=(*self.shape[:-1], stop - start), first=self.first + start)

    def as_heads(self, heads: int) -> Rows:
        """Return columns as heads of equal width."""
        width = self.shape[0] // heads
        return replace(self, shape=(heads, width), stride=width)

    @property
    def is_whole(self) -> bool:
        return prod(self.shape) == self.size

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return these numbers of a buffer [T, size] as a view [T, columns] or [T, H, h]."""
        assert buffer.stride(1) == 1
        strides = (self.stride, 1) if len(self.shape) == 2 else (1,)
        start = buffer.storage_offset() + self.first
        return buffer.as_strided((len(buffer), *self.shape), (buffer.stride(0), *strides), start)


@dataclass(frozen=True)
class RMSNorm:
    """x / rms(x) times the weight. A weight in fp32 multiplies before the quotient is rounded.

    A weight [h] takes each head alone, and a weight [H * h] takes all heads together.
    """

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
        """Map x [T, D] or [T, H, h] to the same shape."""
        parts = x.view(len(x), -1, len(self.weight))
        normed = rms_norm(parts, self.weight, self.eps, out=parts if in_place else None)
        return x if in_place else normed.view(x.shape)


@dataclass(frozen=True, eq=False)
class Operation:
    """A computation that writes rows. Its other fields that are `Rows` are read."""

    out: Rows

    @property
    def inputs(self) -> list[Rows]:
        values = (getattr(self, field.name) for field in fields(self) if field.name != "out")
        return [value for value in values if isinstance(value, Rows)]

    @property
    def outputs(self) -> list[Rows]:
        return [self.out]

    def precedes(self, later: Operation) -> bool:
        """Return whether a later operation has to wait for this one, by the names of buffers."""
        read, written, read_later, written_later = (
            {part.name for part in parts}
            for parts in (self.inputs, self.outputs, later.inputs, later.outputs)
        )
        return bool(written & (read_later | written_later) or read & written_later)


@dataclass(frozen=True, eq=False)
class Norm(Operation):
    """Normalize x, or its heads."""

    x: Rows
    norm: RMSNorm


@dataclass(frozen=True, eq=False)
class Product(Operation):
    """Multiply x by a quantized matrix, whose name a recording of inputs has."""

    x: Rows
    matrix: Linear
    name: str


@dataclass(frozen=True, eq=False)
class DenseProduct(Operation):
    """Multiply x by a matrix of few rows [R, D], which is never quantized."""

    x: Rows
    weight: torch.Tensor


@dataclass(frozen=True, eq=False)
class HeadProducts(Operation):
    """Multiply each head of x by a matrix of its own."""

    x: Rows
    matrices: Sequence[Linear]
    name: str


@dataclass(frozen=True, eq=False)
class Apply(Operation):
    """Compute each row from the same row of the operands: gates, activations, sums, scaling.

    is_wide: all threads share even one row, because it is long.
    """

    operands: tuple[Rows, ...]
    kernel: RowKernel
    is_wide: bool = False

    @property
    def inputs(self) -> list[Rows]:
        return [*self.operands]


@dataclass(frozen=True, eq=False)
class Rotate(Operation):
    """Rotate the heads of x to the rows' positions."""

    x: Rows
    rope: RotaryEmbedding


@dataclass(frozen=True, eq=False)
class ScaleByPosition(Operation):
    """Multiply each row by the rope's `query_scales` at its position."""

    x: Rows
    rope: RotaryEmbedding


@dataclass(frozen=True, eq=False)
class Attend(Operation):
    """Store keys and values in the layer's cache, and attend to it, as `KVCache.attend` does."""

    queries: Rows
    keys: Rows
    values: Rows
    layer: int
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Convolve(Operation):
    """Convolve each channel of x with its last inputs, which the layer's state has as "conv"."""

    x: Rows
    convolution: Convolution
    layer: int


@dataclass(frozen=True, eq=False)
class UpdateState(Operation):
    """Update the layer's state by queries, keys and values, which are overwritten, and read it.

    ba: the logits of rates and decays.
    """

    qkv: Rows
    ba: Rows
    rule: DeltaRule
    layer: int


@dataclass(frozen=True, eq=False)
class Route(Operation):
    """Choose experts of each row, int64 [T, K], and write their weights, fp32 [T, K]."""

    x: Rows
    router: Router
    selected: Rows

    @property
    def inputs(self) -> list[Rows]:
        return [self.x]

    @property
    def outputs(self) -> list[Rows]:
        return [self.out, self.selected]


@dataclass(frozen=True, eq=False)
class Experts(Operation):
    """Sum up the outputs of the selected experts, weighted.

    layer: counted from the first layer with experts.
    """

    x: Rows
    selected: Rows
    weights: Rows
    layer: int
    runner: ExpertRunner


class UnsupportedOperationError(Exception):
    """An executor lacks an operation, or does not take its shapes. The text names the operation."""
