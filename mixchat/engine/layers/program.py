"""Turns descriptions into a CPU's programs, for one token of each of N sequences.

An operation becomes works, which are steps that do not need each other. The works of a layer are
then gathered into as few stages as they allow, since threads meet after each stage.

N = sequences, D = hidden_size, H = heads, K = num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, singledispatch
from itertools import count
from typing import Any, TypeAlias

import torch

from mixchat.engine.caches.paged_cache import KVSteps, PagedKVCache
from mixchat.engine.caches.sequence_cache import SequenceCache
from mixchat.engine.caches.state_cache import StateCache
from mixchat.engine.layers import operations as ops
from mixchat.engine.layers.operations import Operation, Rows, UnsupportedOperationError
from mixchat.engine.layers.rope import RotaryEmbedding
from mixchat.experts.holder import LayerExperts
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.dense import matmul_step
from mixchat.kernels.cpu.pages import CacheShape
from mixchat.kernels.cpu.program import Stage, Step
from mixchat.kernels.cpu.quantized_matmul import grouped_matmul_steps
from mixchat.weights.format.expert import Expert, ExpertSlots
from mixchat.weights.matrix.linear import PackedLinear
from mixchat.weights.matrix.quant_type import Linear

Span: TypeAlias = tuple[Hashable, int, int]
"""Numbers of a buffer's row, from a first one to an end. Results inside an operation have one."""


@dataclass(frozen=True)
class Work:
    """Steps that do not need each other.

    is_wide: all threads share the steps. Otherwise one thread is faster for one row. is_serial: one
    thread computes it for any rows.
    """

    steps: Sequence[Step]
    reads: Sequence[Span]
    writes: Sequence[Span]
    is_wide: bool = False
    is_serial: bool = False

    def precedes(self, later: Work) -> bool:
        """Return whether later work of the description has to wait for this one."""
        return (
            _overlap(self.writes, later.reads)
            or _overlap(self.writes, later.writes)
            or _overlap(self.reads, later.writes)
        )


def _overlap(spans: Iterable[Span], others: Sequence[Span]) -> bool:
    return any(
        name == other and start < other_end and other_start < end
        for name, start, end in spans
        for other, other_start, other_end in others
    )


def span(part: Rows) -> Span:
    """Return the numbers of a row that `part` lies in."""
    heads = part.shape[0] if len(part.shape) == 2 else 1
    return part.name, part.first, part.first + (heads - 1) * part.stride + part.shape[-1]


def staged(works: Sequence[Work], sequences: int) -> list[Stage]:
    """Return works, which are in an order that is valid, as few stages.

    The last work comes first. Each earlier one joins the last stage that ends before all works that
    wait for it. With one sequence, works that are not wide follow each other in one thread.
    """
    stages: list[tuple[bool, list[Work]]] = []  # whether one thread runs it, the last stage first
    for work in reversed(works):
        is_alone = work.is_serial or (sequences == 1 and not work.is_wide)
        earliest = 0
        for place, (runs_alone, members) in enumerate(stages):
            if any(work.precedes(member) for member in members):
                # One thread runs the works of a stage in their order.
                earliest = place if runs_alone and is_alone else place + 1
        fitting = (
            place
            for place in range(earliest, len(stages))
            if stages[place][0] == is_alone
            or (is_alone and not work.is_serial and place == earliest)
        )
        joined = next(fitting, None)
        if joined is None:
            stages.append((is_alone, [work]))
        else:
            stages[joined][1].insert(0, work)
    return [
        Stage([step for work in members for step in work.steps], alone=runs_alone)
        for runs_alone, members in reversed(stages)
    ]


class TokenBuffers:
    """The buffers and steps with which all layers compute the next token of each of N sequences."""

    def __init__(
        self, cache: SequenceCache, hidden_size: int, dtype: torch.dtype, sequences: int = 1
    ) -> None:
        self._cache = cache
        self.dtype = dtype
        self.sequences = sequences
        self._buffers: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}
        self._spans = count()
        self._rotations: dict[tuple[RotaryEmbedding, int], Step] = {}
        self._scalings: dict[tuple[RotaryEmbedding, int], Step] = {}
        self._positions: list[torch.Tensor] = []  # what the steps that rotate or scale point to
        self._attention: dict[CacheShape, list[KVSteps]] = {}
        self._bound: dict[int, list[Sequence[Callable[[Any], None]]]] = {}
        self._slots: dict[Hashable, ExpertSlots] = {}
        self.x = self.tensor(Rows.new("x", hidden_size))

    def buffer(self, part: Rows) -> torch.Tensor:
        """Return the buffer [N, size] that all layers share."""
        key = part.name, part.size, part.dtype or self.dtype
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self.sequences, part.size, dtype=key[2])
        return self._buffers[key]

    def put(self, part: Rows, buffer: torch.Tensor) -> None:
        """Let operations use this buffer [N, size]."""
        self._buffers[part.name, part.size, part.dtype or self.dtype] = buffer

    def tensor(self, part: Rows) -> torch.Tensor:
        """Return a view [N, columns] or [N, H, columns]."""
        return part.of(self.buffer(part))

    def flat(self, part: Rows) -> torch.Tensor:
        """Return a view [N, columns] of contiguous rows, or of heads that follow each other."""
        tensor = self.tensor(part)
        return tensor if tensor.dim() == 2 else tensor.view(len(tensor), -1)

    def new_span(self) -> Span:
        """Return a new span that stands for a result inside an operation."""
        return next(self._spans), 0, 1

    def require(self, operation: Operation, *columns: int) -> None:
        """Raise `UnsupportedOperationError` unless kernels take rows of so many columns."""
        for number in columns:
            if not rows.can_compute(self.dtype, number):
                raise UnsupportedOperationError(
                    f"{type(operation).__name__} of {number} columns in {self.dtype}"
                )

    def packed(self, operation: Operation, matrix: Linear) -> PackedLinear:
        """Return a matrix that the kernels multiply."""
        if not isinstance(matrix, PackedLinear) or not matrix.is_whole:
            raise UnsupportedOperationError(f"{type(operation).__name__} with a dense matrix")
        self.require(operation, matrix.matrix.shape[1])
        return matrix

    def slots(self, expert: Expert, x: torch.Tensor, pairs: int) -> ExpertSlots:
        """Return slots for x [N, D], which all layers with experts of this form share."""
        if expert.form not in self._slots:
            self._slots[expert.form] = ExpertSlots(expert, x, pairs)
        return self._slots[expert.form]

    def rotate(self, rope: RotaryEmbedding, x: torch.Tensor, out: torch.Tensor) -> Step:
        """Return the step that rotates x to the tokens' positions."""
        key = rope, x.data_ptr()
        if key not in self._rotations:
            self._rotations[key] = rows.rotate_step(x, out, rope.width)
        return self._rotations[key]

    def scale(self, rope: RotaryEmbedding, x: torch.Tensor, out: torch.Tensor) -> Step:
        """Return the step that multiplies rows x [N, n] by the tokens' `query_scales`."""
        key = rope, x.data_ptr()
        if key not in self._scalings:
            weights = torch.ones(len(x), 1)
            self._scalings[key] = rows.weighted_sum_step(x.unsqueeze(1), weights, out)
        return self._scalings[key]

    def bind(self, layer: int, set_places: Sequence[Callable[[Any], None]]) -> None:
        """Before each token, call these with the sequences' caches. They set addresses in steps."""
        self._bound.setdefault(layer, []).append(set_places)

    def attention_steps(self, operation: ops.Attend) -> list[KVSteps]:
        """Return the steps of each sequence. They do not keep the sinks alive."""
        cache = self._cache.layers[operation.layer]
        if not isinstance(cache, PagedKVCache):
            raise UnsupportedOperationError("Attend without pages")
        shape = cache.shape
        if shape not in self._attention:
            parts = (*operation.inputs, operation.out)
            tensors = (torch.split(self.tensor(part), 1) for part in parts)
            self._attention[shape] = [
                KVSteps(shape, query, key, value, out, self._cache.capacity)
                for query, key, value, out in zip(*tensors, strict=True)
            ]
        steps = [each.for_layer(cache.window, operation.sinks) for each in self._attention[shape]]
        self.bind(operation.layer, [partial(_set_pages, each) for each in steps])
        return steps

    def bind_state(self, layer: int, name: str, steps: Sequence[Step]) -> None:
        """Let the steps of the sequences read and write a tensor of their states in a layer."""
        cache = self._cache.layers[layer]
        if not cache.has_steps:
            raise UnsupportedOperationError("a state on another device")
        self.bind(layer, [partial(_set_state, step, name) for step in steps])

    def set_places(self, caches: Sequence[SequenceCache]) -> None:
        """Let all steps compute the next tokens of these caches."""
        positions = [cache.length for cache in caches]
        self._positions = [
            tensor
            for (rope, _), step in self._rotations.items()
            for tensor in rope.set_positions(step, positions)
        ]
        for (rope, _), step in self._scalings.items():
            assert rope.query_scales is not None
            scales = rope.query_scales[positions]
            step.set(weight=scales.data_ptr())
            self._positions.append(scales)
        for layer, bound in self._bound.items():
            for number, cache in enumerate(caches):
                place = _place(cache, layer)
                for set_places in bound:
                    set_places[number](place)


def _place(cache: SequenceCache, layer: int) -> Any:
    """Return a layer's cache, or the states before and after its next token."""
    layer_cache = cache.layers[layer]
    if not isinstance(layer_cache, StateCache):
        return layer_cache
    ((_, before, after),) = layer_cache.segments(1)
    return before, after


def _set_pages(steps: KVSteps, cache: PagedKVCache) -> None:
    cache.set_place(steps)


def _set_state(step: Step, name: str, states: Any) -> None:
    before, after = states
    step.set(before=before[name].data_ptr(), after=after[name].data_ptr())


def layer_works(operations: Sequence[Operation], buffers: TokenBuffers) -> list[Work]:
    """Return the works of operations. Raises `UnsupportedOperationError`."""
    return [work for operation in operations for work in works(operation, buffers)]


def _work(operation: Operation, *steps: Step, is_wide: bool = False) -> Work:
    """Return an operation that is one work."""
    reads = [span(part) for part in operation.inputs]
    return Work(steps, reads, [span(operation.out)], is_wide)


@singledispatch
def works(operation: Operation, buffers: TokenBuffers) -> list[Work]:
    """Return an operation as works in a valid order. Raises `UnsupportedOperationError`."""
    raise UnsupportedOperationError(type(operation).__name__)


@works.register
def _(operation: ops.Norm, buffers: TokenBuffers) -> list[Work]:
    weight = operation.norm.weight
    buffers.require(operation, len(weight))
    x, out = (buffers.tensor(part) for part in (operation.x, operation.out))
    if x.shape[-1] != len(weight) or x.dim() == 2:
        x, out = (each.view(len(each), -1, len(weight)) for each in (x, out))
    return [_work(operation, rows.rms_norm_step(x, weight, operation.norm.eps, out))]


@works.register
def _(operation: ops.Product, buffers: TokenBuffers) -> list[Work]:
    matrix = buffers.packed(operation, operation.matrix)
    x = buffers.flat(operation.x)
    out = buffers.flat(operation.out)
    rounded = buffers.new_span()
    round_x, multiply = matrix.steps(x, out)
    return [
        Work([round_x], [span(operation.x)], [rounded]),
        Work([multiply], [rounded], [span(operation.out)], is_wide=True),
    ]


@works.register
def _(operation: ops.DenseProduct, buffers: TokenBuffers) -> list[Work]:
    buffers.require(operation, operation.x.size)
    x = buffers.flat(operation.x)
    out = buffers.flat(operation.out)
    return [_work(operation, matmul_step(x, operation.weight, out), is_wide=True)]


@works.register
def _(operation: ops.HeadProducts, buffers: TokenBuffers) -> list[Work]:
    matrices = [buffers.packed(operation, matrix).matrix for matrix in operation.matrices]
    buffers.require(operation, *(part.shape[-1] for part in (operation.x, operation.out)))
    heads = operation.x.shape[0]
    tokens = buffers.sequences
    by_head = torch.empty(heads, tokens, operation.out.shape[1], dtype=buffers.dtype)
    copied = buffers.new_span()
    rounded = buffers.new_span()
    multiplied = buffers.new_span()
    copies: list[Work] = []
    # The matrix of a head has the rows of all tokens as its input.
    x = buffers.tensor(operation.x)
    x_rows = None
    read = span(operation.x)
    if operation.x.is_whole:
        x_rows = torch.arange(tokens * heads).view(tokens, heads).t().flatten()
    else:
        gathered = torch.empty(heads, tokens, x.shape[2], dtype=buffers.dtype)
        copies.append(Work(_copies(x, gathered.transpose(0, 1)), [read], [copied]))
        x = gathered
        read = copied
    flat = x.flatten(0, 1)
    rounds, products = grouped_matmul_steps(flat, matrices, [*by_head], x_rows, exact=True)
    result = [*copies, Work(rounds, [read], [rounded])]
    for steps in products:  # each reads what the one before has decoded
        result.append(Work(steps, [rounded], [multiplied], is_wide=True))
    out = buffers.tensor(operation.out)
    return [
        *result,
        Work(_copies(by_head.transpose(0, 1), out), [multiplied], [span(operation.out)]),
    ]


def _copies(x: torch.Tensor, out: torch.Tensor) -> list[Step]:
    """Return steps that copy the heads of each token, from x [N, H, n] to `out`."""
    return [rows.copy_step(*token) for token in zip(x, out, strict=True)]


@works.register
def _(operation: ops.Apply, buffers: TokenBuffers) -> list[Work]:
    *operands, out = (buffers.flat(part) for part in (*operation.operands, operation.out))
    buffers.require(operation, getattr(operation.kernel, "width", out.shape[1]))
    step = operation.kernel.step(*operands, out)
    return [_work(operation, step, is_wide=operation.is_wide)]


@works.register
def _(operation: ops.Rotate, buffers: TokenBuffers) -> list[Work]:
    x = buffers.tensor(operation.x)
    out = buffers.tensor(operation.out)
    turned = operation.rope.width
    buffers.require(operation, turned // 2, x.shape[2] - turned)
    return [_work(operation, buffers.rotate(operation.rope, x, out))]


@works.register
def _(operation: ops.ScaleByPosition, buffers: TokenBuffers) -> list[Work]:
    x = buffers.tensor(operation.x)
    out = buffers.tensor(operation.out)
    buffers.require(operation, x.shape[1])
    return [_work(operation, buffers.scale(operation.rope, x, out))]


@works.register
def _(operation: ops.Attend, buffers: TokenBuffers) -> list[Work]:
    steps = buffers.attention_steps(operation)
    stored = buffers.new_span()
    attended = buffers.new_span()
    queries, keys, values = map(span, operation.inputs)
    return [
        Work([each.store for each in steps], [keys, values], [stored]),
        Work([each.attend for each in steps], [queries, stored], [attended], is_wide=True),
        Work([each.merge for each in steps], [attended], [span(operation.out)], is_wide=True),
    ]


@works.register
def _(operation: ops.Convolve, buffers: TokenBuffers) -> list[Work]:
    convolution = operation.convolution
    buffers.require(operation, convolution.channels)
    tensors = (torch.split(buffers.tensor(part), 1) for part in (operation.x, operation.out))
    steps = [convolution.step(x, out) for x, out in zip(*tensors, strict=True)]
    buffers.bind_state(operation.layer, "conv", steps)
    return [_work(operation, *steps, is_wide=not convolution.gated)]


@works.register
def _(operation: ops.UpdateState, buffers: TokenBuffers) -> list[Work]:
    rule = operation.rule
    prepared = buffers.new_span()
    if not rule.shape.can_compute(buffers.dtype, "cpu"):
        raise UnsupportedOperationError(f"UpdateState of {rule.shape} in {buffers.dtype}")
    parts = operation.qkv, operation.ba, operation.out
    tensors = (torch.split(buffers.tensor(part), 1) for part in parts)
    pairs = [rule.steps(*sequence) for sequence in zip(*tensors, strict=True)]
    prepares, recurs = zip(*pairs, strict=True)
    buffers.bind_state(operation.layer, "state", recurs)
    qkv = span(operation.qkv)
    ba = span(operation.ba)
    return [
        Work(prepares, [qkv, ba], [qkv, prepared]),
        Work(recurs, [qkv, prepared], [span(operation.out)], is_wide=True),
    ]


@works.register
def _(operation: ops.Route, buffers: TokenBuffers) -> list[Work]:
    buffers.require(operation, operation.x.size)
    parts = operation.x, operation.selected, operation.out
    score, choose = operation.router.steps(*map(buffers.tensor, parts))
    scored = buffers.new_span()
    chosen = [span(operation.selected), span(operation.out)]
    return [
        Work([score], [span(operation.x)], [scored], is_wide=True),
        Work([choose], [scored], chosen),
    ]


class ExpertWorks:
    """The works of `Experts` whose experts are all in memory, at addresses that may change."""

    def __init__(
        self, operation: ops.Experts, buffers: TokenBuffers, experts: LayerExperts
    ) -> None:
        x, selected, weights = map(buffers.tensor, operation.inputs)
        slots = buffers.slots(experts[0], x, selected.numel())
        chosen_by = torch.arange(selected.numel()) // selected.shape[1]
        self._table = experts.addresses.data_ptr()
        self._arrange = slots.arrange(selected.view(-1), chosen_by, experts.addresses)
        added = rows.weighted_sum_step(
            slots.outputs, weights, buffers.tensor(operation.out), slots.places
        )
        arranged = buffers.new_span()
        computed = buffers.new_span()
        of_x, of_selected, of_weights = map(span, operation.inputs)
        self.works = [Work([self._arrange], [of_selected], [arranged], is_serial=True)]
        for stage in slots.stages:
            chain = [of_x, arranged, computed]
            self.works.append(Work(stage.steps, chain, [computed], is_wide=not stage.alone))
        self.works.append(Work([added], [computed, arranged, of_weights], [span(operation.out)]))

    def use(self, experts: LayerExperts) -> None:
        """Let the works compute these experts. The works do not keep the experts alive."""
        table = experts.addresses.data_ptr()
        if table != self._table:
            self._table = table
            self._arrange.set(table=table)
