"""Decoding: the layers for one token as programs of kernels.

A program has the steps of `Block` in `model.py`, by the same kernels and so with the same bits. It
saves the time that Python takes between them. Where all experts are in memory, one program goes
through all layers; else it ends with the router of a layer, whose runner has to bring some. The
tensors are made once, and each token writes to them anew.

D = hidden_size, H = num_attention_heads, G = num_key_value_heads, h = head_dim,
I = intermediate_size, E = num_local_experts, K = num_experts_per_tok.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import is_

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.kv_cache import KVCache, PagedKVCache
from mixchat.engine.model import AfterLayer, Block, KVContext
from mixchat.experts.cache import ExpertKey
from mixchat.kernels import router, rows
from mixchat.kernels.program import Group, Program
from mixchat.weights.format.blueprint import Blueprint, Expert
from mixchat.weights.matrix.linear import Linear, PackedLinear


class Decoder:
    """Computes the layers for the next token of a cache: a `SingleTokenDecoder`.

    It takes this cache, and others of the same capacity and form.
    """

    def __init__(self, config: ModelConfig, blocks: Sequence[Block], cache: PagedKVCache) -> None:
        self._cache, self._rope = cache, blocks[0].attention.rope
        self._runner = blocks[0].moe.runner
        self._shared = _Shared(config, blocks[0].attention_norm.weight.dtype, cache)
        self._layers = [_Layer(layer, block, self._shared) for layer, block in enumerate(blocks)]
        self._programs: dict[tuple[int, int], Program] = {}  # by their layers: from and to

    def run(
        self, x: torch.Tensor, before: KVContext, after_layer: AfterLayer
    ) -> torch.Tensor | None:
        if not isinstance(before, PagedKVCache) or not self._cache.is_like(before):
            return None
        self._shared.x.copy_(x)
        self._rope.set_position(self._shared.rotate, before.length)
        for layer in self._layers:
            layer.set_place(before)
        end = 0
        while end < len(self._layers):
            end = self._run_from(end)
            after_layer(end - 1)
        return self._shared.x

    def _run_from(self, start: int) -> int:
        """Compute layers up to the first whose experts have to be brought; return its end."""
        # It keeps the memory of these experts until the program has ended.
        resident = self._runner.resident([layer.keys for layer in self._layers[start:]])
        layers = self._layers[start : start + len(resident) + 1]
        end = start + len(layers)
        for layer, experts in zip(layers, [*resident, ()], strict=False):  # the last may have none
            if layer.use(experts):
                self._programs.clear()
        if (start, end) not in self._programs:
            groups = [group for layer in layers for group in layer.groups]
            self._programs[start, end] = Program(groups)
        self._programs[start, end].run()
        for layer in layers:
            layer.finish()
        return end


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
    """The tensors that the steps of all layers write, and steps that each layer uses or copies."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, cache: PagedKVCache) -> None:
        hidden, choices = config.hidden_size, config.num_experts_per_tok
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        width = config.head_dim
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
        self.weights = torch.empty(1, choices)
        self.gate_up = torch.empty(choices, 2 * config.intermediate_size, dtype=dtype)
        self.gated = torch.empty(choices, config.intermediate_size, dtype=dtype)
        self.outputs = torch.empty(1, choices, hidden, dtype=dtype)


class _Layer:
    """The steps of a layer: attention and router, then the experts, where all are in memory."""

    def __init__(self, layer: int, block: Block, shared: _Shared) -> None:
        self._layer, self._shared, self._runner = layer, shared, block.moe.runner
        self.keys = [ExpertKey(layer, expert) for expert in range(block.moe.gate.shape[0])]
        store, attend, merge = shared.in_cache
        self._in_cache = store.copy(), attend.copy(), merge.copy()
        self._selected = torch.empty(1, shared.weights.shape[1], dtype=torch.int64)
        self._attention = self._attention_groups(block)
        # Not kept alive, so that the memory of a slot can be given back.
        self._experts: Sequence[weakref.ref[Expert]] = ()
        self.groups = self._attention

    def set_place(self, cache: PagedKVCache) -> None:
        """Let the groups compute the next token of a cache."""
        cache.set_place(self._in_cache, self._layer)

    def use(self, experts: Sequence[Expert]) -> bool:
        """Let the groups end with these experts, the layer's E; without any, with the router.

        Returns False where they do already.
        """
        before = [expert() for expert in self._experts]
        if len(before) == len(experts) and all(map(is_, before, experts)):
            return False
        self.groups = self._attention + (self._expert_groups(experts) if experts else [])
        self._experts = [weakref.ref(expert) for expert in experts]
        return True

    def finish(self) -> None:
        """Let the runner compute the experts that are not in the groups, or note those that are."""
        shared = self._shared
        if self._experts:
            chosen = self._selected[0].tolist()
            self._runner.note_hits([self.keys[expert] for expert in chosen])
            return
        # Copies, because a runner may hold on to what it is given.
        given = (tensor.clone() for tensor in (shared.normed, self._selected, shared.weights))
        shared.x += self._runner.run(self._layer, *given)

    def _attention_groups(self, block: Block) -> list[Group]:
        """Return the steps up to the router."""
        shared, attention = self._shared, block.attention
        norm, moe_norm, x, normed = block.attention_norm, block.moe_norm, shared.x, shared.normed
        round_x, project = _packed(attention.qkv_proj).steps(normed, shared.qkv)
        store, attend, merge = self._in_cache
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
                    router.route_step(normed, block.moe.gate, self._selected, shared.weights),
                ],
            ),
        ]

    def _expert_groups(self, experts: Sequence[Expert]) -> list[Group]:
        """Return the steps of the K experts that are selected, whose addresses are looked up."""
        shared = self._shared
        up, down = _packed(experts[0].w13), _packed(experts[0].w2)
        w13 = [up.steps(shared.normed, out) for out in torch.split(shared.gate_up, 1)]
        w2 = [
            down.steps(x, out)
            for x, out in zip(
                torch.split(shared.gated, 1), torch.split(shared.outputs[0], 1), strict=True
            )
        ]
        table = [(*_packed(one.w13).addresses, *_packed(one.w2).addresses) for one in experts]
        targets = [
            [product.address(name) for _, product in pair for name in ("codes", "absmax")]
            for pair in zip(w13, w2, strict=True)
        ]
        look_up = router.look_up_step(self._selected, torch.tensor(table), torch.tensor(targets))
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
