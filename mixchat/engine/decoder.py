"""Decoding: the layers for one token, each as a program of kernels.

A program has the steps of `Block` in `model.py`, by the same kernels and so with the same bits. It
saves the time that Python takes between them. The tensors are made once, and each token writes to
them anew.

D = hidden_size, H = num_attention_heads, G = num_key_value_heads, h = head_dim,
I = intermediate_size, E = num_local_experts, K = num_experts_per_tok.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import is_

import torch

from mixchat.engine.kv_cache import KVCache, PagedKVCache
from mixchat.engine.model import Block, TokensBefore
from mixchat.experts.keys import ExpertKey
from mixchat.kernels import router, rows
from mixchat.kernels.program import Group, Program
from mixchat.model_config import ModelConfig
from mixchat.weights.format.blueprint import Blueprint, Expert
from mixchat.weights.matrix.linear import Linear, PackedLinear


class Decoder:
    """Computes the layers for the next token of a cache: a `LayersForOneToken`.

    It takes this cache, and others of the same capacity and form.
    """

    def __init__(self, config: ModelConfig, blocks: Sequence[Block], cache: PagedKVCache) -> None:
        shared = _Shared(config, blocks[0].attention_norm.weight.dtype, cache)
        self._shared, self._x = shared, shared.x
        self._layers = [_Layer(layer, block, shared) for layer, block in enumerate(blocks)]

    def begin(self, x: torch.Tensor, before: TokensBefore) -> bool:
        if not isinstance(before, PagedKVCache) or not self._shared.cache.is_like(before):
            return False
        self._shared.cache = before
        self._x.copy_(x)
        return True

    def run(self, layer: int) -> torch.Tensor:
        self._layers[layer].run()
        return self._x


def new_decoder(used: Blueprint, blocks: Sequence[Block], cache: KVCache) -> Decoder | None:
    """Return the decoder of a model that computes `used`; None where kernels cannot do it all."""
    config, weight = used.config, blocks[0].attention_norm.weight
    columns = config.hidden_size, config.intermediate_size, config.head_dim // 2
    takes_rows = all(rows.can_compute(weight.dtype, n, weight.device.type) for n in columns)
    matrices = used.qkv(0), used.o(0), used.expert.w13, used.expert.w2
    packed = all(matrix.packed for matrix in matrices)
    if not takes_rows or not packed or not isinstance(cache, PagedKVCache):
        return None
    return Decoder(config, blocks, cache)


class _Shared:
    """The tensors that the steps of all layers write, and the steps that only differ in place."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, cache: PagedKVCache) -> None:
        hidden, choices = config.hidden_size, config.num_experts_per_tok
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.cache, width = cache, config.head_dim
        self.x, self.normed, self.added = (torch.empty(1, hidden, dtype=dtype) for _ in range(3))
        self.qkv = torch.empty(1, (heads + 2 * groups) * width, dtype=dtype)
        by_head = self.qkv.view(1, -1, width)  # [1, H + 2G, h]
        rotated = torch.empty(1, heads + groups, width, dtype=dtype)
        self.attended = torch.empty(1, heads * width, dtype=dtype)
        self.rotate = rows.rotate_step(by_head[:, : heads + groups], rotated)
        self.in_cache = cache.steps(
            rotated[:, :heads],
            rotated[:, heads:],
            by_head[:, heads + groups :],
            self.attended.view(1, heads, width),
        )
        self.selected = torch.empty(1, choices, dtype=torch.int64)
        self.weights = torch.empty(1, choices)
        self.gate_up = torch.empty(choices, 2 * config.intermediate_size, dtype=dtype)
        self.gated = torch.empty(choices, config.intermediate_size, dtype=dtype)
        self.outputs = torch.empty(1, choices, hidden, dtype=dtype)


class _Layer:
    """The program of a layer: attention and router, then the experts, where all are in memory."""

    def __init__(self, layer: int, block: Block, shared: _Shared) -> None:
        self._layer, self._shared = layer, shared
        self._rope, self._runner = block.attention.rope, block.moe.runner
        self._attention = _attention_groups(block, shared)
        self._keys = [ExpertKey(layer, expert) for expert in range(block.moe.gate.shape[0])]
        # Not kept alive, so that the memory of a slot can be given back.
        self._experts: Sequence[weakref.ref[Expert]] = ()
        self._program = Program(self._attention)

    def run(self) -> None:
        """Compute the layer, from `x` to `x`."""
        shared, cache = self._shared, self._shared.cache
        self._rope.set_position(shared.rotate, cache.length)
        cache.set_place(shared.in_cache, self._layer)
        self._use(self._runner.resident(self._keys))
        self._program.run()
        if self._experts:
            chosen = shared.selected[0].tolist()
            self._runner.note_hits([self._keys[expert] for expert in chosen])
            return
        # Copies, because a runner may hold on to what it is given.
        given = (tensor.clone() for tensor in (shared.normed, shared.selected, shared.weights))
        shared.x += self._runner.run(self._layer, *given)

    def _use(self, experts: Sequence[Expert]) -> None:
        """Let the program end with these experts, the layer's E; without any, with the router."""
        before = [expert() for expert in self._experts]
        if len(before) == len(experts) and all(map(is_, before, experts)):
            return
        self._experts = [weakref.ref(expert) for expert in experts]
        groups = _expert_groups(experts, self._shared) if experts else []
        self._program = Program(self._attention + groups)


def _attention_groups(block: Block, shared: _Shared) -> list[Group]:
    """Return the steps up to the router."""
    attention, norm, moe_norm = block.attention, block.attention_norm, block.moe_norm
    x, normed = shared.x, shared.normed
    round_x, project = _packed(attention.qkv_proj).steps(normed, shared.qkv)
    store, attend, merge = shared.in_cache
    round_attended, project_out = _packed(attention.o_proj).steps(shared.attended, shared.added)
    return [
        Group(after=[rows.rms_norm_step(x, norm.weight, norm.eps, normed), round_x]),
        Group([project], after=[shared.rotate, store]),
        Group([attend]),
        Group([merge], after=[round_attended]),
        Group(
            [project_out],
            after=[
                rows.add_step(x, shared.added, x),
                rows.rms_norm_step(x, moe_norm.weight, moe_norm.eps, normed),
                router.route_step(normed, block.moe.gate, shared.selected, shared.weights),
            ],
        ),
    ]


def _expert_groups(experts: Sequence[Expert], shared: _Shared) -> list[Group]:
    """Return the steps of the K experts that are selected, whose addresses are looked up."""
    outputs = shared.outputs[0]  # [K, D]
    up, down = _packed(experts[0].w13), _packed(experts[0].w2)
    w13 = [up.steps(shared.normed, out) for out in torch.split(shared.gate_up, 1)]
    w2 = [
        down.steps(x, out)
        for x, out in zip(torch.split(shared.gated, 1), torch.split(outputs, 1), strict=True)
    ]
    table = [(*_packed(expert.w13).addresses, *_packed(expert.w2).addresses) for expert in experts]
    targets = [
        [product.address(name) for _, product in pair for name in ("codes", "absmax")]
        for pair in zip(w13, w2, strict=True)
    ]
    look_up = router.look_up_step(shared.selected, torch.tensor(table), torch.tensor(targets))
    return [
        Group(after=[look_up, *(round_x for round_x, _ in w13)]),
        Group([product for _, product in w13]),
        Group([rows.swiglu_step(shared.gate_up, shared.gated)]),
        Group([round_x for round_x, _ in w2]),
        Group(
            [product for _, product in w2],
            after=[
                rows.weighted_sum_step(shared.outputs, shared.weights, shared.added),
                rows.add_step(shared.x, shared.added, shared.x),
            ],
        ),
    ]


def _packed(matrix: Linear) -> PackedLinear:
    assert isinstance(matrix, PackedLinear)
    return matrix
