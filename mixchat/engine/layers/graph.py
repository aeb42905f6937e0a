"""Turns descriptions into a GPU's kernels for one token, with all that they read and write.

A product leaves partial sums, which the next kernel adds up. What follows a product is fused with
it as far as there is a kernel: norms of heads, rotation and the store of keys are one, an addition
and the norm after it are one, and so is a DeltaNet without its matrices.

D = hidden_size, K = num_experts_per_tok, L = layers with experts, P = partial sums, S = splits of a
product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import TypeVar

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.caches.device_cache import DeviceKVCache
from mixchat.engine.caches.layer_cache import LayerCache
from mixchat.engine.caches.sequence_cache import scratch_bytes
from mixchat.engine.layers import operations as ops
from mixchat.engine.layers.block import Block
from mixchat.engine.layers.operations import Operation, RMSNorm, UnsupportedOperationError
from mixchat.kernels.cpu.gated_norm import GatedNorm
from mixchat.kernels.cpu.rows import Addition, Clamping, Gating, Scaling, Swiglu, Weighting
from mixchat.kernels.gpu.attention import Parts, attend
from mixchat.kernels.gpu.convolution import gated_convolution
from mixchat.kernels.gpu.delta_net import DeltaNetWeights, delta_net
from mixchat.kernels.gpu.experts import experts_down, experts_up
from mixchat.kernels.gpu.heads import heads
from mixchat.kernels.gpu.latents import Norm, latent_heads, normalized
from mixchat.kernels.gpu.norm import add_norm
from mixchat.kernels.gpu.product import Matrix, head_products, product, split
from mixchat.kernels.gpu.route import route
from mixchat.weights.format.gpu_expert import GpuExpertForm
from mixchat.weights.matrix.gpu_linear import GpuLinear
from mixchat.weights.matrix.quant_type import Linear

Kernels = list[Callable[[], object]]
_FP32 = torch.float32
_Op = TypeVar("_Op", bound=Operation)
_Kernel = TypeVar("_Kernel")


@dataclass
class TokenTensors:
    """The tensors that the layers of a GPU share.

    x, normed: the token's row [D]. place: int64, the tokens before it, and then the addresses of
    states before and after it. sums: a layer's outputs, fp32 [1 + P, D], which the next norm adds
    to x. The first row is the host's part. selected: int32 [L, K]. weights: fp32 [K]. finished:
    counts programs, int32 [1], and is 0 between kernels.
    """

    x: torch.Tensor
    normed: torch.Tensor
    place: torch.Tensor
    sums: torch.Tensor
    selected: torch.Tensor
    weights: torch.Tensor
    finished: torch.Tensor
    _others: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def new(
        cls,
        size: int,
        dtype: torch.dtype,
        sums: int,
        selected: tuple[int, int],
        places: int,
        device: torch.device,
    ) -> TokenTensors:
        """Return tensors of zeros.

        sums: P of the layer with most outputs. selected: L and K. places: numbers in `place`.
        """
        zeros = partial(torch.zeros, device=device)
        return cls(
            x=zeros(size, dtype=dtype),
            normed=zeros(size, dtype=dtype),
            place=zeros(places, dtype=torch.int64),
            sums=zeros(1 + sums, size, dtype=torch.float32),
            selected=zeros(*selected, dtype=torch.int32),
            weights=zeros(selected[1], dtype=torch.float32),
            finished=zeros(1, dtype=torch.int32),
        )

    @property
    def past(self) -> torch.Tensor:
        """Return the tokens before the token, int32 [1]."""
        return self.place[:1].view(torch.int32)[:1]

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor that a layer's kernels hand on, in the type of x by default."""
        dtype = dtype or self.x.dtype
        name = f"{name} {shape} {dtype}"
        if name not in self._others:
            self._others[name] = torch.zeros(shape, dtype=dtype, device=self.x.device)
        return self._others[name]


@dataclass(frozen=True)
class LayerPlace:
    """The memory of one layer on a GPU.

    cache: of its keys and values. addresses: of its states, each before and after the token.
    experts, dense: the forms of its parts. selected: int32 [K]. table: the addresses of its
    experts. with_host: whether the host adds to what the experts give.
    """

    cache: LayerCache
    addresses: torch.Tensor
    experts: GpuExpertForm | None
    dense: GpuExpertForm | None
    selected: torch.Tensor
    table: torch.Tensor | None
    with_host: bool


class GraphWriter:
    """Writes the kernels of one layer after the other.

    A layer's output is added to x by the first kernel of the next layer, its norm.
    """

    def __init__(self, config: ModelConfig, tokens: TokenTensors) -> None:
        self._config = config
        self._tokens = tokens
        self._kernels: Kernels = []
        self._dense: Kernels = []  # of a dense part that nothing has needed yet
        self._sums: dict[str, torch.Tensor] = {}  # fp32 [P, D], by the names of buffers
        self._added, self._factor = tokens.sums[:0], 1.0  # what the next norm does to x

    def write(self, block: Block, place: LayerPlace) -> tuple[Kernels, Kernels]:
        """Return the kernels up to the layer's router, and those of its experts.

        Raises `UnsupportedOperationError`.
        """
        first, *rest = block.operations
        assert isinstance(first, ops.Norm)
        self._norm(first)
        mixer = [*takewhile(lambda operation: not _reads(operation, "added"), rest)]
        self._sums["added"] = self._mixer(mixer, place)
        operations = iter(rest[len(mixer) :])
        route_of_experts = None if block.is_dense else block.route
        up: Kernels = []
        own: Kernels = []
        for operation in operations:
            if isinstance(operation, ops.Norm):
                self._norm(operation)
            elif isinstance(operation, ops.Apply) and isinstance(operation.kernel, Addition):
                self._add(operation)
            elif isinstance(operation, ops.Apply) and isinstance(operation.kernel, Scaling):
                self._factor = operation.kernel.factor
            elif isinstance(operation, ops.Experts):
                up = self._kernels
                own = self._experts(place)
                self._kernels = []
            elif isinstance(operation, ops.Route) and operation is route_of_experts:
                self._route(operation, place.selected, self._tokens.weights, self._kernels)
            else:
                dense = [operation]
                while dense[-1].out.name != "dense":
                    dense.append(next(operations))
                self._dense_part(dense, place)
        self._run_dense()
        if block.is_dense:
            up = self._kernels
            self._kernels = []
        return up, own

    def last(self, norm: RMSNorm) -> Kernels:
        """Return the kernels after all layers, which leave the normalized row in `normed`."""
        self._add_norm(norm)
        return self._kernels

    def _norm(self, operation: ops.Norm) -> None:
        name = operation.x.name
        tokens = self._tokens
        if name == "x":
            self._add_norm(operation.norm)
            return
        if name == "dense":
            self._run_dense()
        # Outputs that are added later lie one behind the other, and their sum is another row.
        outputs = tokens.tensor("outputs", 3, *tokens.x.shape, dtype=_FP32)
        sums = self._sums[name]
        row = 0 if name == "dense" else 1 + (sums.data_ptr() == outputs.data_ptr())
        self._kernels.append(_normalized(sums, operation.norm, outputs[row], tokens))
        self._sums[name] = outputs[row : row + 1]

    def _add_norm(self, norm: RMSNorm) -> None:
        tokens = self._tokens
        operands = self._added, norm.weight, tokens.normed, norm.eps, tokens.finished
        factor = None if self._factor == 1 else self._factor
        self._kernels.append(partial(add_norm, tokens.x, *operands, factor=factor))
        self._added = tokens.sums[:0]
        self._factor = 1.0

    def _add(self, operation: ops.Apply) -> None:
        """Let the next norm add the outputs to x, or let both outputs be one."""
        x, addend = operation.operands
        added = self._sums.pop(addend.name)
        if x.name == "x":
            self._added = added
            return
        parts = sorted((added, self._sums[x.name]), key=torch.Tensor.data_ptr)
        rows = sum(map(len, parts))
        assert parts[0].data_ptr() + parts[0].nbytes == parts[1].data_ptr()
        joined = parts[0].as_strided((rows, parts[0].shape[1]), parts[0].stride())
        self._sums[operation.out.name] = joined

    def _mixer(self, operations: Sequence[Operation], place: LayerPlace) -> torch.Tensor:
        """Write a mixer. Return the partial sums of its output, fp32 [S, D]."""
        types = {type(operation) for operation in operations}
        if ops.UpdateState in types:
            kernels, outputs = _delta_net(operations, place, self._tokens)
        elif ops.Convolve in types:
            kernels, outputs = _short_convolution(operations, place, self._tokens)
        elif ops.HeadProducts in types:
            kernels, outputs = _latent_attention(operations, place, self._config, self._tokens)
        else:
            kernels, outputs = _attention(operations, place, self._config, self._tokens)
        self._kernels += kernels
        return outputs

    def _route(
        self, operation: ops.Route, selected: torch.Tensor, weights: torch.Tensor, kernels: Kernels
    ) -> None:
        """Write the choice of experts [K] of the normed row, and their weights [K]."""
        router = operation.router
        tokens = self._tokens
        if router.groups > 1:
            raise UnsupportedOperationError("Route by groups of experts")
        logits = tokens.tensor("logits of experts", len(router.gate), dtype=_FP32)
        operands = tokens.normed, router, logits, selected, weights, tokens.finished
        kernels.append(partial(route, *operands))

    def _experts(self, place: LayerPlace) -> Kernels:
        """Return the kernels of the experts, and of a dense part that nothing needs before."""
        assert place.experts is not None
        assert place.table is not None
        tokens = self._tokens
        end = 1 + place.experts.sums(len(place.selected))
        self._sums["added"] = tokens.sums[0 if place.with_host else 1 : end]
        chosen = place.table, place.selected, tokens.weights
        kernels = _selected_experts(place.experts, *chosen, tokens.sums[1:end], tokens)
        dense = self._dense
        self._dense = []
        return [*kernels, *dense]

    def _dense_part(self, operations: Sequence[Operation], place: LayerPlace) -> None:
        """Write a dense part, an expert that is always chosen, with its own weight."""
        _only(operations, ops.Product, ops.Route, Swiglu, Weighting)
        assert place.dense is not None
        tokens = self._tokens
        device = self._tokens.x.device
        selected = torch.zeros(1, dtype=torch.int32, device=device)
        weight = torch.ones(1, device=device)
        for gate in _all(operations, ops.Route):
            self._route(gate, selected, weight, self._dense)
        # Both matrices lie in one block, which begins with the first tensor of the first one.
        network = _matrix(_all(operations, ops.Product)[0].matrix)
        first = network.codes if network.absmax is None else network.absmax
        table = torch.tensor([first.data_ptr()], device=device)
        start = 1 if place.experts is None else 1 + place.experts.sums(len(place.selected))
        sums = tokens.sums[start : start + place.dense.sums(1)]
        self._sums["dense"] = sums
        self._dense += _selected_experts(place.dense, table, selected, weight, sums, tokens)

    def _run_dense(self) -> None:
        """Write a dense part's kernels here, if they are not written yet."""
        self._kernels += self._dense
        self._dense = []


def _reads(operation: Operation, name: str) -> bool:
    return any(part.name == name for part in operation.inputs)


def _type(operation: Operation) -> type:
    """Return the type of an operation, or of the kernel that it applies."""
    return type(operation.kernel if isinstance(operation, ops.Apply) else operation)


def _only(operations: Sequence[Operation], *types: type) -> None:
    """Raise `UnsupportedOperationError` for operations or kernels of other types."""
    others = {_type(each).__name__ for each in operations} - {each.__name__ for each in types}
    if others:
        raise UnsupportedOperationError(", ".join(sorted(others)))


def _all(operations: Sequence[Operation], one: type[_Op]) -> list[_Op]:
    return [operation for operation in operations if isinstance(operation, one)]


def _kernels(operations: Sequence[Operation], one: type[_Kernel]) -> list[_Kernel]:
    """Return the kernels of this type that operations apply."""
    kernels = (operation.kernel for operation in _all(operations, ops.Apply))
    return [kernel for kernel in kernels if isinstance(kernel, one)]


def _normalized(
    sums: torch.Tensor, norm: RMSNorm, out: torch.Tensor, tokens: TokenTensors
) -> Callable[[], object]:
    """Return the kernel that stores the norm of a sum of rows, fp32 [P, D], in `out` [D]."""
    unused = tokens.tensor("sum of rows", *tokens.x.shape)
    return partial(add_norm, unused, sums, norm.weight, out, norm.eps, tokens.finished, adds=False)


def _matrix(linear: Linear) -> Matrix:
    if not isinstance(linear, GpuLinear):
        raise UnsupportedOperationError("Product with a matrix that no kernel takes")
    return linear.matrix


def _product(
    operation: ops.Product, x: torch.Tensor, tokens: TokenTensors
) -> tuple[Callable[[], object], torch.Tensor]:
    """Return the kernel of a product with a row [C], and its partial sums, fp32 [S, R]."""
    matrix = _matrix(operation.matrix)
    shape = split(matrix.form).count, 1, matrix.form.rows
    sums = tokens.tensor(operation.out.name, *shape, dtype=_FP32)
    return partial(product, x[None], matrix, sums), sums[:, 0]


def _attention(
    operations: Sequence[Operation], place: LayerPlace, config: ModelConfig, tokens: TokenTensors
) -> tuple[Kernels, torch.Tensor]:
    """Return the kernels from the normed row to partial sums of the output, fp32 [S, D]."""
    _only(operations, ops.Product, ops.Norm, ops.Rotate, ops.Attend, Clamping, Gating)
    into, out = _all(operations, ops.Product)
    ((turn,), (attending,)) = _all(operations, ops.Rotate), _all(operations, ops.Attend)
    norms = [norm.norm.weight for norm in _all(operations, ops.Norm) if norm.out == norm.x]
    clip = next((clamping.limit for clamping in _kernels(operations, Clamping)), None)
    assert isinstance(place.cache, DeviceKVCache)
    stored = place.cache.tensors
    window = place.cache.window
    past = tokens.past
    count, width = attending.queries.shape
    queries, attended = (tokens.tensor(name, 1, count, width) for name in ("queries", "attended"))
    has_gates = bool(_kernels(operations, Gating))
    gates = tokens.tensor("gates", count, width) if has_gates else None
    parts = Parts.for_tokens(1, count, stored, window, _scratch(config, tokens))
    of_values = {
        "v_norm": any(norm.out != norm.x for norm in _all(operations, ops.Norm)),
        "values_are_keys": into.out.shape[0] == count + attending.keys.shape[0],
    }
    project, qkv = _product(into, tokens.normed, tokens)
    project_out, outputs = _product(out, attended.view(-1), tokens)
    tables = turn.rope.tables
    eps = config.rms_norm_eps
    kernels: Kernels = [
        project,
        partial(heads, qkv, queries[0], stored, past, tables, norms, eps, clip, gates, **of_values),
        partial(attend, queries, stored, past, attended, parts, window, attending.sinks, gates),
        project_out,
    ]
    return kernels, outputs


def _scratch(config: ModelConfig, tokens: TokenTensors) -> torch.Tensor:
    """Return the memory of the splits of attention, which all layers and sequences share."""
    size = scratch_bytes(config) // _FP32.itemsize
    return tokens.tensor("splits of attention", size, dtype=_FP32)


def _delta_net(
    operations: Sequence[Operation], place: LayerPlace, tokens: TokenTensors
) -> tuple[Kernels, torch.Tensor]:
    """Return the kernels from the normed row to partial sums of the output, fp32 [S, D]."""
    fused = ops.DenseProduct, ops.Convolve, ops.UpdateState, GatedNorm
    _only(operations, ops.Product, *fused)
    into, out = _all(operations, ops.Product)
    (small,), (convolve,) = _all(operations, ops.DenseProduct), _all(operations, ops.Convolve)
    (update,), (norm,) = _all(operations, ops.UpdateState), _kernels(operations, GatedNorm)
    rule = update.rule
    if rule.skips is not None:
        raise UnsupportedOperationError("UpdateState of Mamba2")
    heads_shape = rule.shape.value_heads, rule.shape.value_dim
    read, gated = (tokens.tensor(name, *heads_shape) for name in ("read", "gated values"))
    counters = tokens.tensor("heads that have finished", heads_shape[0], dtype=torch.int32)
    weights = DeltaNetWeights(
        small.weight, convolve.convolution.weight, rule.rates, rule.biases, norm.weight, norm.eps
    )
    project, projected = _product(into, tokens.normed, tokens)
    project_out, outputs = _product(out, gated.view(-1), tokens)
    states = place.addresses, rule.shape.state_shape
    compute = partial(delta_net, tokens.normed, projected, weights, *states, read, gated, counters)
    return [project, compute, project_out], outputs


def _short_convolution(
    operations: Sequence[Operation], place: LayerPlace, tokens: TokenTensors
) -> tuple[Kernels, torch.Tensor]:
    """Return the kernels from the normed row to partial sums of the output, fp32 [S, D]."""
    _only(operations, ops.Product, ops.Convolve)
    into, out = _all(operations, ops.Product)
    (convolve,) = _all(operations, ops.Convolve)
    project, projected = _product(into, tokens.normed, tokens)
    convolved = tokens.tensor("convolved", convolve.convolution.channels)
    project_out, outputs = _product(out, convolved, tokens)
    weight = convolve.convolution.weight
    compute = partial(gated_convolution, projected, weight, place.addresses, convolved)
    return [project, compute, project_out], outputs


def _latent_attention(
    operations: Sequence[Operation], place: LayerPlace, config: ModelConfig, tokens: TokenTensors
) -> tuple[Kernels, torch.Tensor]:
    """Return the kernels from the normed row to partial sums of the output, fp32 [S, D]."""
    _only(operations, ops.Product, ops.Norm, ops.HeadProducts, ops.Rotate, ops.Attend)
    into, *between, out = _all(operations, ops.Product)
    kv_norm, *q_norms = [
        Norm(norm.norm.weight, norm.norm.eps) for norm in _all(operations, ops.Norm)
    ]
    of_keys, of_values = _all(operations, ops.HeadProducts)
    (attending,), turn = _all(operations, ops.Attend), _all(operations, ops.Rotate)[0]
    assert isinstance(place.cache, DeviceKVCache)
    stored = place.cache.tensors
    past = tokens.past
    count, latent = attending.out.shape
    whole = tokens.tensor("queries", 1, *attending.queries.shape)
    kept = tokens.tensor("kept queries", *of_keys.x.shape)
    attended = tokens.tensor("attended", 1, count, latent)
    values = tokens.tensor("values of heads", *of_values.out.shape)
    project, latents = _product(into, tokens.normed, tokens)
    kernels: Kernels = [project]
    queries = latents
    for norm, product_of_queries in zip(q_norms, between, strict=True):
        row = tokens.tensor("latent of queries", config.q_lora_rank or 0)
        kernels.append(partial(normalized, latents, norm, row))
        project, queries = _product(product_of_queries, row, tokens)
        kernels.append(project)
    parts = Parts.for_tokens(1, count, stored, None, _scratch(config, tokens))
    scale = place.cache.shape.score_scale
    project_out, outputs = _product(out, values.view(-1), tokens)
    tables = kv_norm, turn.rope.tables
    kernels += [
        partial(latent_heads, queries, latents, *tables, past, stored, kept, whole[0]),
        _head_products(of_keys, kept, whole[0]),
        partial(attend, whole, stored, past, attended, parts, scale=scale),
        _head_products(of_values, attended[0], values),
        project_out,
    ]
    return kernels, outputs


def _head_products(
    operation: ops.HeadProducts, x: torch.Tensor, out: torch.Tensor
) -> Callable[[], object]:
    """Return the kernel of the products of heads x [H, C] with their matrices."""
    matrices = [_matrix(matrix) for matrix in operation.matrices]
    codes = [matrix.codes for matrix in matrices]
    scales = [
        code if m.absmax is None else m.absmax for m, code in zip(matrices, codes, strict=True)
    ]
    addresses = [[tensor.data_ptr() for tensor in each] for each in (codes, scales)]
    table = torch.tensor(addresses, device=x.device)
    return partial(head_products, x, table, matrices[0].form, matrices[0].levels, out)


def _selected_experts(
    expert: GpuExpertForm,
    table: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    tokens: TokenTensors,
) -> Kernels:
    """Return the kernels of selected experts, or of a dense part, which write to `out` [P, D].

    table: the addresses of all experts, int64. selected: int32 [K]. weights: of each, fp32 [K].
    """
    form = expert.form
    levels = expert.levels
    if not form.is_supported:
        raise UnsupportedOperationError("Experts with matrices that no kernel takes")
    gated = tokens.tensor("gated", len(selected), form.down.form.columns)
    return [
        partial(experts_up, tokens.normed, selected, table, form, levels, gated),
        partial(experts_down, gated, selected, weights, table, form, levels, out),
    ]
