"""Turns descriptions into a GPU's kernels for one token, with all that they read and write.

A rule writes the kernels of an operation, or of several that follow one another. A product leaves
partial sums, which the next kernel adds up.

D = hidden_size, K = num_experts_per_tok, L = layers with experts, P = partial sums, S = splits of a
product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.caches.device_cache import DeviceKVCache
from mixchat.engine.caches.layer_cache import LayerCache
from mixchat.engine.caches.sequence_cache import scratch_bytes
from mixchat.engine.layers import operations as ops
from mixchat.engine.layers.block import Block
from mixchat.engine.layers.operations import Operation, Rows, UnsupportedOperationError
from mixchat.kernels.cpu.gated_norm import GatedNorm
from mixchat.kernels.cpu.rows import (
    Addition,
    Clamping,
    Gating,
    HeadGating,
    Scaling,
    Swiglu,
    Weighting,
)
from mixchat.kernels.gpu.attention import Parts, attend
from mixchat.kernels.gpu.convolution import gated_convolution
from mixchat.kernels.gpu.delta_net import DeltaNetWeights, delta_net
from mixchat.kernels.gpu.dense import dense_product
from mixchat.kernels.gpu.experts import experts_down, experts_up
from mixchat.kernels.gpu.heads import heads
from mixchat.kernels.gpu.latents import latent_heads
from mixchat.kernels.gpu.norm import add_norm
from mixchat.kernels.gpu.product import Matrix, head_products, product, split
from mixchat.kernels.gpu.route import route
from mixchat.weights.format.gpu_expert import GpuExpertForm
from mixchat.weights.matrix.gpu_linear import GpuLinear
from mixchat.weights.matrix.quant_type import Linear

Kernels = list[Callable[[], object]]
_FP32 = torch.float32


@dataclass
class TokenTensors:
    """The tensors that the layers of a GPU share.

    x, normed: the token's row [D]. sequence: int64, the tokens before it, and then the addresses of
    states before and after it. outputs: of a layer's experts and dense part, fp32 [1 + P, D], which
    the next norm adds to x. The first row is the host's part. selected: int32 [L, K]. weights: fp32
    [K]. finished: counts programs, int32 [1], and is 0 between kernels. scratch: fp32, for the
    splits of attention. sums: of products, fp32 [P, R], by the names of buffers.
    """

    x: torch.Tensor
    normed: torch.Tensor
    sequence: torch.Tensor
    outputs: torch.Tensor
    selected: torch.Tensor
    weights: torch.Tensor
    finished: torch.Tensor
    scratch: torch.Tensor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    _rows: dict[Rows, torch.Tensor] = field(default_factory=dict)
    _others: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def new(
        cls,
        config: ModelConfig,
        dtype: torch.dtype,
        outputs: int,
        layers: int,
        numbers: int,
        device: torch.device,
    ) -> TokenTensors:
        """Return tensors of zeros.

        outputs: P of the layer with most outputs. layers: L. numbers: in `sequence`.
        """
        zeros = partial(torch.zeros, device=device)
        size = config.hidden_size
        choices = config.num_experts_per_tok
        tensors = cls(
            x=zeros(size, dtype=dtype),
            normed=zeros(size, dtype=dtype),
            sequence=zeros(numbers, dtype=torch.int64),
            outputs=zeros(1 + outputs, size, dtype=_FP32),
            selected=zeros(layers, choices, dtype=torch.int32),
            weights=zeros(choices, dtype=_FP32),
            finished=zeros(1, dtype=torch.int32),
            scratch=zeros(scratch_bytes(config) // _FP32.itemsize, dtype=_FP32),
        )
        tensors.put(Rows.new("x", size), tensors.x)
        tensors.put(Rows.new("normed", size), tensors.normed)
        return tensors

    @property
    def past(self) -> torch.Tensor:
        """Return the tokens before the token, int32 [1]."""
        return self.sequence[:1].view(torch.int32)[:1]

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor that a layer's kernels hand on, in the type of x by default."""
        dtype = dtype or self.x.dtype
        name = f"{name} {shape} {dtype}"
        if name not in self._others:
            self._others[name] = torch.zeros(shape, dtype=dtype, device=self.x.device)
        return self._others[name]

    def put(self, part: Rows, tensor: torch.Tensor) -> None:
        """Let kernels write these numbers of a row to a tensor, and read them there."""
        self._rows[part] = tensor

    def out(self, part: Rows) -> torch.Tensor:
        """Return where a kernel writes numbers of a row [columns] or [heads, columns]."""
        if part not in self._rows:
            buffer = self.tensor(part.name, 1, part.size, dtype=part.dtype)
            self._rows[part] = part.of(buffer)[0]
        return self._rows[part]

    def row(self, part: Rows) -> torch.Tensor:
        """Return what a kernel has written to `out`."""
        if part not in self._rows:
            raise UnsupportedOperationError(f"a kernel that reads {part.name} {part.shape}")
        return self._rows[part]

    def sums_of(self, part: Rows) -> torch.Tensor:
        """Return the partial sums of the whole row that a product left, fp32 [S, R]."""
        if part.name not in self.sums:
            raise UnsupportedOperationError(f"a kernel that adds up {part.name}")
        return self.sums[part.name]


@dataclass(frozen=True)
class LayerMemory:
    """The memory of one layer on a GPU.

    tokens: what all layers share. cache: of its keys and values. addresses: of its states, each
    before and after the token. experts, dense: the forms of these parts. selected: int32 [K].
    table: the addresses of its experts. with_host: whether the host adds to what the experts give.
    """

    tokens: TokenTensors
    cache: LayerCache
    addresses: torch.Tensor
    experts: GpuExpertForm | None
    dense: GpuExpertForm | None
    selected: torch.Tensor
    table: torch.Tensor | None
    with_host: bool

    @property
    def kv(self) -> DeviceKVCache:
        assert isinstance(self.cache, DeviceKVCache)
        return self.cache

    @property
    def dense_start(self) -> int:
        """Return the first row of the dense part in `outputs`, behind those of the experts."""
        return 1 if self.experts is None else 1 + self.experts.sums(len(self.selected))


class GraphWriter:
    """Writes the kernels of one layer after the other.

    A layer's outputs are added to x by the first norm of the next layer, since the host may have to
    add its part to them before. So the additions are left to the next layer.
    """

    def __init__(self) -> None:
        self._left: list[Operation] = []

    def write(self, block: Block, memory: LayerMemory) -> tuple[Kernels, Kernels]:
        """Return the kernels up to the layer's router, and those of its experts.

        Raises `UnsupportedOperationError`.
        """
        if not block.is_dense:
            memory.tokens.put(_in_32_bits(block.route.selected), memory.selected)
            memory.tokens.put(block.route.out, memory.tokens.weights)
        operations = [*self._left, *_with_early_experts(block.operations)]
        types = [_type(operation) for operation in operations]
        left = takewhile(lambda each: each in (ops.Norm, Addition, Scaling), reversed(types))
        end = len(types) - len([*left])
        start = end if block.is_dense else types.index(ops.Experts)
        self._left = operations[end:]
        return kernels(operations[:start], memory), kernels(operations[start:end], memory)

    def last(self, norm: ops.Norm, memory: LayerMemory) -> Kernels:
        """Return the kernels after all layers, which end with a norm. memory: of the last layer."""
        return kernels([*self._left, norm], memory)


def _with_early_experts(operations: Sequence[Operation]) -> list[Operation]:
    """Put experts before a dense part that they do not need. The host waits for their router."""
    result: list[Operation] = []
    for operation in operations:
        index = len(result)
        if isinstance(operation, (ops.Route, ops.Experts)):
            while index and not result[index - 1].precedes(operation):
                index -= 1
        result.insert(index, operation)
    return result


_RULES: list[tuple[Sequence[type | list[type]], Callable[..., Kernels | None]]] = []


def _rule(*types: type | list[type]) -> Callable[[Any], Any]:
    """Let a function write the kernels of operations of these types that follow one another.

    `Apply` has the type of its kernel. A type in a list may be missing. The function gets the
    operations, or None for each that is missing. It returns None if its kernels compute others.
    """

    def register(function: Callable[..., Kernels | None]) -> Callable[..., Kernels | None]:
        _RULES.append((types, function))
        return function

    return register


def kernels(operations: Sequence[Operation], memory: LayerMemory) -> Kernels:
    """Return the kernels of operations, by the first rule that takes the next ones.

    Raises `UnsupportedOperationError` for an operation that no rule takes.
    """
    result: Kernels = []
    while operations:
        for types, write in _RULES:
            taken, rest = _taken(types, operations)
            if len(taken) == len(types) and (written := write(memory, *taken)) is not None:
                result += written
                operations = rest
                break
        else:
            raise UnsupportedOperationError(_type(operations[0]).__name__)
    return result


def _taken(
    types: Sequence[type | list[type]], operations: Sequence[Operation]
) -> tuple[list[Any], Sequence[Operation]]:
    """Return the first operations by types, up to a type that they do not have, and the others."""
    taken: list[Any] = []
    for each in types:
        wanted = each[0] if isinstance(each, list) else each
        if operations and _type(operations[0]) is wanted:
            taken.append(operations[0])
            operations = operations[1:]
        elif isinstance(each, list):
            taken.append(None)
        else:
            break
    return taken, operations


def _type(operation: Operation) -> type:
    """Return the type of an operation, or of the kernel that it applies."""
    return type(operation.kernel if isinstance(operation, ops.Apply) else operation)


@_rule(Addition, [Scaling], ops.Norm)
def _add_norm(
    memory: LayerMemory, addition: ops.Apply, scaling: Any | None, norm: ops.Norm
) -> Kernels | None:
    """Add an output to x, scale x, and normalize it into another row."""
    changed = {each.out for each in (addition, scaling) if each is not None}
    if changed != {norm.x} or norm.out == norm.x:
        return None
    tokens = memory.tokens
    added = tokens.sums_of(addition.operands[1])
    operands = tokens.row(norm.x), added, norm.norm.weight, tokens.out(norm.out), norm.norm.eps
    factor = None if scaling is None else scaling.kernel.factor
    return [partial(add_norm, *operands, tokens.finished, factor=factor)]


@_rule(Addition)
def _add(memory: LayerMemory, addition: ops.Apply) -> Kernels:
    """Let two outputs be one. They are added up with what they are added to."""
    both = sorted(map(memory.tokens.sums_of, addition.operands), key=torch.Tensor.data_ptr)
    rows = sum(map(len, both))
    assert both[0].data_ptr() + both[0].nbytes == both[1].data_ptr()
    joined = both[0].as_strided((rows, both[0].shape[1]), both[0].stride())
    memory.tokens.sums[addition.out.name] = joined
    return []


@_rule(
    [ops.Norm], [ops.Norm], [ops.Norm], [Clamping], ops.Rotate, ops.Attend, [Gating], [HeadGating]
)
def _attend(
    memory: LayerMemory,
    first: ops.Norm | None,
    second: ops.Norm | None,
    third: ops.Norm | None,
    clip: Any | None,
    turn: ops.Rotate,
    attending: ops.Attend,
    *gatings: ops.Apply | None,
) -> Kernels | None:
    """Normalize, clip and rotate heads as they are stored, and gate what attention gives."""
    gating = gatings[0] or gatings[1]
    norms = [norm for norm in (first, second, third) if norm is not None]
    is_of_one_row = all(norm.x.name == turn.x.name for norm in norms)
    if not is_of_one_row or turn.out.name != attending.queries.name:
        return None
    tokens = memory.tokens
    queries = tokens.out(attending.queries)
    count = len(queries)
    of_values = [norm for norm in norms if norm.out == attending.values]
    values = of_values[0].x if of_values else attending.values
    weights = [norm.norm.weight for norm in norms if norm.out == norm.x]
    eps = norms[0].norm.eps if norms else 0.0
    limit = None if clip is None else clip.kernel.limit
    gates = None if gatings[0] is None else tokens.out(gatings[0].operands[1])
    arrays = tokens.sums_of(turn.x), queries, memory.kv.tensors, tokens.past, turn.rope.tables
    store = partial(heads, *arrays, weights, eps, limit, gates)
    store = partial(store, v_norm=bool(of_values), values_are_keys=values == turn.x[count:])
    return [store, _attend_to_stored(memory, attending, gating)]


def _attend_to_stored(
    memory: LayerMemory, attending: ops.Attend, gating: ops.Apply | None = None
) -> Callable[[], object]:
    """Return the kernel that attends to the cache, and multiplies by what gates give."""
    tokens = memory.tokens
    cache = memory.kv
    queries = tokens.row(attending.queries)[None]
    gates = None if gating is None else tokens.row(gating.operands[1])[None]
    parts = Parts.for_tokens(1, queries.shape[1], cache.tensors, cache.window, tokens.scratch)
    arrays = queries, cache.tensors, tokens.past, tokens.out(attending.out)[None], parts
    scale = cache.shape.score_scale
    return partial(attend, *arrays, cache.window, attending.sinks, gates, scale)


@_rule(ops.Norm, ops.HeadProducts, ops.Rotate, ops.Rotate, ops.Attend)
def _attend_to_latents(
    memory: LayerMemory,
    norm: ops.Norm,
    absorb: ops.HeadProducts,
    turn: ops.Rotate,
    turn_key: ops.Rotate,
    attending: ops.Attend,
) -> Kernels:
    """Normalize the latent and rotate queries and the key as they are stored."""
    tokens = memory.tokens
    sums = tokens.sums_of(absorb.x), tokens.sums_of(norm.x)
    weight = norm.norm.weight
    tables = turn.rope.tables
    stored = memory.kv.tensors
    rows = tokens.out(absorb.x), tokens.out(attending.queries)
    return [
        partial(latent_heads, *sums, weight, norm.norm.eps, tables, tokens.past, stored, *rows),
        *_head_products(memory, absorb),
        _attend_to_stored(memory, attending),
    ]


@_rule(ops.HeadProducts)
def _head_products(memory: LayerMemory, operation: ops.HeadProducts) -> Kernels:
    x = memory.tokens.row(operation.x)
    matrices = [_matrix(matrix) for matrix in operation.matrices]
    codes = [matrix.codes for matrix in matrices]
    scales = [
        code if m.absmax is None else m.absmax for m, code in zip(matrices, codes, strict=True)
    ]
    addresses = [[tensor.data_ptr() for tensor in each] for each in (codes, scales)]
    table = torch.tensor(addresses, device=x.device)
    first = matrices[0]
    out = memory.tokens.out(operation.out)
    return [partial(head_products, x, table, first.form, first.levels, out)]


def _matrix(linear: Linear) -> Matrix:
    if not isinstance(linear, GpuLinear):
        raise UnsupportedOperationError("Product with a matrix that no kernel takes")
    return linear.matrix


@_rule(ops.DenseProduct, ops.Convolve, ops.UpdateState, GatedNorm)
def _delta_net(
    memory: LayerMemory,
    small: ops.DenseProduct,
    convolve: ops.Convolve,
    update: ops.UpdateState,
    gating: Any,
) -> Kernels | None:
    """Compute all of a DeltaNet between its products. Mamba2 has other states."""
    tokens = memory.tokens
    rule = update.rule
    if rule.skips is not None:
        return None
    norm = gating.kernel.weight, gating.kernel.eps
    taps = convolve.convolution.weight
    weights = DeltaNetWeights(small.weight, taps, rule.rates, rule.biases, *norm)
    count = rule.shape.value_heads
    read = tokens.out(update.out)
    counters = tokens.tensor("heads that have finished", count, dtype=torch.int32)
    inputs = tokens.row(small.x), tokens.sums_of(convolve.x), weights, memory.addresses
    out = tokens.out(gating.out)
    return [partial(delta_net, *inputs, rule.shape.state_shape, read, out, counters)]


@_rule(ops.DenseProduct)
def _dense_product(memory: LayerMemory, operation: ops.DenseProduct) -> Kernels:
    tokens = memory.tokens
    rows = tokens.row(operation.x), operation.weight, tokens.out(operation.out)
    return [partial(dense_product, *rows)]


@_rule(ops.Convolve)
def _convolve(memory: LayerMemory, operation: ops.Convolve) -> Kernels | None:
    tokens = memory.tokens
    convolution = operation.convolution
    if not convolution.gated:
        return None
    inputs = tokens.sums_of(operation.x), convolution.weight, memory.addresses
    return [partial(gated_convolution, *inputs, tokens.out(operation.out))]


@_rule(ops.Product, Swiglu, ops.Product, [Weighting])
def _dense_part(
    memory: LayerMemory,
    gate_up: ops.Product,
    swiglu: ops.Apply,
    down: ops.Product,
    weighting: ops.Apply | None,
) -> Kernels:
    """Compute a dense part as an expert that is always chosen."""
    assert memory.dense is not None
    tokens = memory.tokens
    # Both matrices lie in one block, which begins with the first tensor of the first one.
    matrix = _matrix(gate_up.matrix)
    first = matrix.codes if matrix.absmax is None else matrix.absmax
    table = torch.tensor([first.data_ptr()], device=first.device)
    selected = tokens.tensor("dense part", 1, dtype=torch.int32)
    weight = torch.ones(1, device=first.device)
    if weighting is not None:
        weight = tokens.row(weighting.operands[1])
    sums = tokens.outputs[memory.dense_start :][: memory.dense.sums(1)]
    tokens.sums[(weighting or down).out.name] = sums
    x = tokens.row(gate_up.x)
    return _selected_experts(memory.dense, tokens, x, selected, weight, table, sums)


@_rule(ops.Experts)
def _experts(memory: LayerMemory, operation: ops.Experts) -> Kernels:
    assert memory.experts is not None
    assert memory.table is not None
    tokens = memory.tokens
    end = memory.dense_start
    tokens.sums[operation.out.name] = tokens.outputs[0 if memory.with_host else 1 : end]
    _, selected, weights = operation.inputs
    rows = tokens.row(operation.x), tokens.row(_in_32_bits(selected)), tokens.row(weights)
    return _selected_experts(memory.experts, tokens, *rows, memory.table, tokens.outputs[1:end])


def _in_32_bits(selected: Rows) -> Rows:
    return replace(selected, dtype=torch.int32)


def _selected_experts(
    expert: GpuExpertForm,
    tokens: TokenTensors,
    x: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
) -> Kernels:
    """Return the kernels of selected experts, or of a dense part, which write to `out` [P, D].

    selected: int32 [K]. weights: of each, fp32 [K]. table: the addresses of all experts, int64.
    """
    form = expert.form
    levels = expert.levels
    if not form.is_supported:
        raise UnsupportedOperationError("Experts with matrices that no kernel takes")
    gated = tokens.tensor("gated", len(selected), form.down.form.columns)
    return [
        partial(experts_up, x, selected, table, form, levels, gated),
        partial(experts_down, gated, selected, weights, table, form, levels, out),
    ]


@_rule(ops.Route)
def _route(memory: LayerMemory, operation: ops.Route) -> Kernels:
    tokens = memory.tokens
    router = operation.router
    if router.groups > 1:
        raise UnsupportedOperationError("Route by groups of experts")
    logits = tokens.tensor("logits of experts", len(router.gate), dtype=_FP32)
    chosen = tokens.out(_in_32_bits(operation.selected)), tokens.out(operation.out)
    return [partial(route, tokens.row(operation.x), router, logits, *chosen, tokens.finished)]


@_rule(ops.Product)
def _product(memory: LayerMemory, operation: ops.Product) -> Kernels:
    tokens = memory.tokens
    x = tokens.row(operation.x)
    matrix = _matrix(operation.matrix)
    shape = split(matrix.form).count, 1, matrix.form.rows
    sums = tokens.tensor(f"sums of {operation.out.name}", *shape, dtype=_FP32)
    tokens.sums[operation.out.name] = sums[:, 0]
    return [partial(product, x.view(1, -1), matrix, sums)]


@_rule(ops.Norm)
def _norm(memory: LayerMemory, operation: ops.Norm) -> Kernels | None:
    """Normalize a row, or a sum of partial sums. A sum's norm in place is a part of another sum."""
    tokens = memory.tokens
    x = operation.x
    weight = operation.norm.weight
    is_in_place = operation.out == x
    if x.shape != weight.shape or (is_in_place and not x.is_whole):
        return None
    if x.name not in tokens.sums:
        row, sums = tokens.row(x), tokens.outputs[:0]
    else:
        row, sums = tokens.tensor("sum", *x.shape), tokens.sums_of(x)[:, x.first :][:, : x.shape[0]]
    if is_in_place and len(sums):
        # Outputs that are added to each other lie one behind the other.
        out = tokens.tensor("normalized outputs", 2, *x.shape, dtype=_FP32)[int(x.name == "added")]
        tokens.sums[x.name] = out[None]
    else:
        out = tokens.out(operation.out)
    operands = row, sums, weight, out, operation.norm.eps, tokens.finished
    return [partial(add_norm, *operands, adds=not len(sums))]
