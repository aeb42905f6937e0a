"""Layers of a model's shape with made-up weights and no experts: to measure what they take."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from mixchat.engine.kv_cache import new_cache
from mixchat.engine.model import Attention, Block, RMSNorm
from mixchat.engine.moe import SparseMoE
from mixchat.engine.rope import RotaryEmbedding
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.matrix.linear import Linear, LinearSpec

_CONTEXT = 128  # tokens before the one that is computed
_COPIES = 4  # layers in turn, so that no cache of the CPU holds one


class _NoExperts:
    """An `ExpertRunner` without experts."""

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        selected_experts.tolist()  # as every runner has to: a GPU is waited for here
        return hidden_states


def layer_probe(blueprint: Blueprint, device: torch.device) -> Callable[[], None]:
    """What computes one token through a layer of this shape, but for the experts."""
    config, dtype = blueprint.config, blueprint.quantization.dtype
    used = blueprint.computed_on(device)
    rope = RotaryEmbedding(config.head_dim, config.rope_theta, 2 * _CONTEXT, dtype, device)
    norm = RMSNorm(torch.ones(config.hidden_size, dtype=dtype, device=device), 1e-5)
    gate = torch.ones(config.num_local_experts, config.hidden_size, dtype=dtype, device=device)

    def block() -> Block:
        qkv, o = _made_up(used.qkv(0), device), _made_up(used.o(0), device)
        moe = SparseMoE(0, gate, config.num_experts_per_tok, _NoExperts())
        return Block(norm, Attention(0, config, qkv, o, rope), norm, moe)

    turns = itertools.cycle([block() for _ in range(_COPIES)])
    cache = new_cache(config, 2 * _CONTEXT, dtype, device)
    earlier = torch.ones(_CONTEXT, config.num_key_value_heads, config.head_dim, dtype=dtype)
    queries = torch.ones(_CONTEXT, config.num_attention_heads, config.head_dim, dtype=dtype)
    cache.attend(0, queries.to(device), earlier.to(device), earlier.to(device))
    cache.length = _CONTEXT
    x = torch.ones(1, config.hidden_size, dtype=dtype, device=device)

    @torch.inference_mode()
    def compute() -> None:
        next(turns)(x, cache)

    return compute


def _made_up(spec: LinearSpec, device: torch.device) -> Linear:
    # The byte makes a number of ordinary size in each type, which slows no arithmetic.
    tensors = [
        torch.full((tensor.nbytes,), 0x3C, dtype=torch.uint8, device=device)
        .view(tensor.dtype)
        .view(tensor.shape)
        for tensor in spec.tensors
    ]
    return spec.build(tensors)
