"""Computes a description for any rows, one operation after the other.

Each operation is computed by a kernel for CPUs if it takes the rows, and by torch otherwise.

T = rows of the pass, D = hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import TypeAlias

import torch

from mixchat.base import gpu
from mixchat.engine.caches.kv_cache import KVCache
from mixchat.engine.caches.paged_cache import PagedKVCache, SequencesAttention
from mixchat.engine.caches.sequence_cache import TokenContext
from mixchat.engine.caches.state_cache import Segment, StateCache
from mixchat.engine.layers import operations as ops
from mixchat.engine.layers.operations import Operation, Rows, UnsupportedOperationError
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.dense import dense_matmul
from mixchat.kernels.cpu.program import Program, together
from mixchat.kernels.cpu.quantized_matmul import grouped_matmul_steps
from mixchat.weights.matrix.linear import PackedLinear
from mixchat.weights.matrix.quant_type import Linear

Record: TypeAlias = Callable[[str, torch.Tensor], object]
"""Takes the inputs [T, C] of a matrix with its name."""

# Numbers after each row of convolved inputs. With rows of a power of two bytes, few tokens' heads
# would find room in a cache.
_PAD = 32


class RowsPass:
    """The buffers of a pass through one layer, each with the pass's T rows.

    exact: each row gets the bits that it has alone, as far as `Linear` can do it.
    """

    def __init__(
        self,
        x: torch.Tensor,
        context: TokenContext,
        *,
        exact: bool = False,
        record: Record | None = None,
    ) -> None:
        self.context = context
        self.exact = exact
        self.record = record
        self.buffers = {"x": x}
        self._segments: dict[int, list[tuple[slice, list[Segment]]]] = {}

    @property
    def tokens(self) -> int:
        return len(self.buffers["x"])

    def read(self, rows: Rows) -> torch.Tensor:
        """Return a view [T, columns] or [T, heads, columns]."""
        return rows.of(self.buffers[rows.name])

    def write(self, rows: Rows, numbers: torch.Tensor) -> None:
        if rows.is_whole:
            # Attention may return heads in another order in memory.
            self.buffers[rows.name] = numbers.flatten(1)
            return
        if rows.name not in self.buffers:
            self.buffers[rows.name] = numbers.new_empty(len(numbers), rows.size)
        self.read(rows).copy_(numbers)

    @property
    def positions(self) -> slice | torch.Tensor:
        return self.context.positions(self.tokens)

    def segments(self, layer: int) -> list[tuple[slice, list[Segment]]]:
        """Return each sequence's rows in the pass, with the parts of its states in a layer."""
        if layer not in self._segments:
            self._segments[layer] = []
            for piece, cache in self.context.pieces(layer):
                assert isinstance(cache, StateCache)
                count = len(range(*piece.indices(self.tokens)))
                self._segments[layer].append((piece, list(cache.segments(count))))
        return self._segments[layer]


def compute_layer(
    operations: Sequence[Operation],
    x: torch.Tensor,
    context: TokenContext,
    *,
    exact: bool = False,
    record: Record | None = None,
) -> torch.Tensor:
    """Map x [T, D] to [T, D] by a layer's operations."""
    layer_pass = RowsPass(x, context, exact=exact, record=record)
    for operation in operations:
        compute(operation, layer_pass)
    return layer_pass.buffers["x"]


@singledispatch
def compute(operation: Operation, rows_pass: RowsPass) -> None:
    """Compute an operation of a pass."""
    raise UnsupportedOperationError(type(operation).__name__)


@compute.register
def _(operation: ops.Norm, rows_pass: RowsPass) -> None:
    x = rows_pass.read(operation.x)
    if operation.out == operation.x and not operation.x.is_whole:
        operation.norm(x, in_place=True)
        return
    rows_pass.write(operation.out, operation.norm(x))


@compute.register
def _(operation: ops.Product, rows_pass: RowsPass) -> None:
    x = rows_pass.read(operation.x).flatten(1)
    if rows_pass.record is not None:
        rows_pass.record(operation.name, x)
    rows_pass.write(operation.out, operation.matrix(x, exact=rows_pass.exact))


@compute.register
def _(operation: ops.DenseProduct, rows_pass: RowsPass) -> None:
    product = dense_matmul(rows_pass.read(operation.x), operation.weight, exact=rows_pass.exact)
    rows_pass.write(operation.out, product)


@compute.register
def _(operation: ops.HeadProducts, rows_pass: RowsPass) -> None:
    x = rows_pass.read(operation.x).transpose(0, 1)  # [H, T, C]
    if rows_pass.record is not None:
        rows_pass.record(operation.name, x.flatten(0, 1))
    products = _head_products(operation.matrices, x, exact=rows_pass.exact)  # [H, T, R]
    rows_pass.write(operation.out, products.transpose(0, 1).contiguous())


def _head_products(matrices: Sequence[Linear], x: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """Map x [H, T, C] to [H, T, R], each head by its rows_pass matrix."""
    packed = [matrix.matrix for matrix in matrices if isinstance(matrix, PackedLinear)]
    if not packed:
        pairs = zip(matrices, x, strict=True)
        return torch.stack([matrix(head, exact=exact) for matrix, head in pairs])
    out = x.new_empty(*x.shape[:2], packed[0].shape[0])
    rounds, products = grouped_matmul_steps(
        x.flatten(0, 1).contiguous(), packed, [*out], exact=exact
    )
    Program([together(*steps) for steps in (rounds, *products)]).run()
    return out


@compute.register
def _(operation: ops.Rotate, rows_pass: RowsPass) -> None:
    rows_pass.write(operation.out, operation.rope(rows_pass.read(operation.x), rows_pass.positions))


@compute.register
def _(operation: ops.ScaleByPosition, rows_pass: RowsPass) -> None:
    assert operation.rope.query_scales is not None
    scales = operation.rope.query_scales[rows_pass.positions]
    scaled = rows.weighted_sum(rows_pass.read(operation.x).unsqueeze(1), scales.unsqueeze(1))
    rows_pass.write(operation.out, scaled)


@compute.register
def _(operation: ops.Attend, rows_pass: RowsPass) -> None:
    queries, keys, values = map(rows_pass.read, operation.inputs)
    rows_pass.write(operation.out, _attend(operation, rows_pass.context, queries, keys, values))


def _attend(
    operation: ops.Attend,
    context: TokenContext,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Return `KVCache.attend` of a layer for the tokens of all sequences in the pass."""
    pieces = context.pieces(operation.layer)
    caches = [cache for _, cache in pieces if isinstance(cache, KVCache)]
    if len(caches) == 1:
        return caches[0].attend(queries, keys, values, operation.sinks)
    paged = [cache for cache in caches if isinstance(cache, PagedKVCache)]
    # One program for all sequences, unless a prompt is among them.
    if len(paged) == len(pieces) == len(queries):
        shape = paged[0].shape
        if shape not in context.programs:
            context.programs[shape] = SequencesAttention(paged, queries, keys, values)
        program: SequencesAttention = context.programs[shape]
        return program.attend(paged, queries, keys, values, operation.sinks)
    attended = [
        cache.attend(queries[piece], keys[piece], values[piece], operation.sinks)
        for cache, (piece, _) in zip(caches, pieces, strict=True)
    ]
    return torch.cat(attended)


@compute.register
def _(operation: ops.Convolve, rows_pass: RowsPass) -> None:
    x = rows_pass.read(operation.x)
    out = operation.out
    convolution = operation.convolution
    columns = out.size + (0 if convolution.gated else _PAD)
    dtype = out.dtype or x.dtype
    convolved = x.new_empty(len(x), columns, dtype=dtype)[:, : out.size]
    for piece, segments in rows_pass.segments(operation.layer):
        for segment, before, after in segments:
            states = before["conv"], after["conv"]
            convolution(x[piece][segment], *states, convolved[piece][segment])
    rows_pass.write(out, convolved)


@compute.register
def _(operation: ops.UpdateState, rows_pass: RowsPass) -> None:
    qkv = rows_pass.read(operation.qkv)
    ba = rows_pass.read(operation.ba)
    read = []
    for piece, segments in rows_pass.segments(operation.layer):
        for segment, before, after in segments:
            inputs = qkv[piece][segment], ba[piece][segment]
            read.append(_update_state(operation, *inputs, before["state"], after["state"]))
    rows_pass.write(operation.out, read[0] if len(read) == 1 else torch.cat(read))


def _update_state(
    operation: ops.UpdateState,
    qkv: torch.Tensor,
    ba: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
) -> torch.Tensor:
    """Return `DeltaRule.__call__`."""
    rule = operation.rule
    if not gpu.is_gpu(qkv.device) or rule.skips is not None:
        return rule(qkv, ba, before, after)
    # Triton is imported only if a GPU computes.
    from mixchat.kernels.gpu.delta_net import delta_rule

    return delta_rule(qkv, rule.prepare(qkv, ba), before, after, ba.dtype)


@compute.register
def _(operation: ops.Route, rows_pass: RowsPass) -> None:
    selected, weights = operation.router(rows_pass.read(operation.x))
    rows_pass.write(operation.selected, selected)
    rows_pass.write(operation.out, weights)


@compute.register
def _(operation: ops.Experts, rows_pass: RowsPass) -> None:
    inputs = map(rows_pass.read, operation.inputs)
    rows_pass.write(
        operation.out, operation.runner.run(operation.layer, *inputs, exact=rows_pass.exact)
    )


@compute.register
def _(operation: ops.Apply, rows_pass: RowsPass) -> None:
    operands = (rows_pass.read(part).flatten(1) for part in operation.operands)
    rows_pass.write(operation.out, operation.kernel(*operands))
