"""The work of a token: the bytes to read, and the operations."""

from __future__ import annotations

from mixchat.engine.kv_cache import cache_bytes
from mixchat.kernels.pages import Bits
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.matrix.linear import LinearSpec


def bytes_per_token(blueprint: Blueprint, context: int, kv_bits: Bits | None) -> int:
    """Return the bytes that decoding one token reads.

    They are attention, `num_experts_per_tok` experts a layer, the head, and the keys and values of
    `context` tokens.
    """
    config = blueprint.config
    experts = config.num_hidden_layers * config.num_experts_per_tok * blueprint.expert.nbytes
    head = [blueprint.head] if blueprint.head else []
    matrices = sum(t.nbytes for spec in [*_attention(blueprint), *head] for t in spec.tensors)
    tied = 0 if blueprint.head else blueprint.embedding.nbytes
    cache = cache_bytes(config, context, blueprint.quantization.dtype, kv_bits)
    return experts + matrices + tied + cache


def operations_per_token(blueprint: Blueprint) -> int:
    """Return multiplications and additions of a prompt's token in matrices with weights.

    They leave out the head, which only the last token needs, and attention's own products.
    """
    config, expert = blueprint.config, blueprint.expert
    each = sum(spec.rows * spec.columns for spec in (expert.gate_up, expert.down))
    experts = config.num_hidden_layers * config.num_experts_per_tok * each
    return 2 * (experts + sum(spec.rows * spec.columns for spec in _attention(blueprint)))


def _attention(blueprint: Blueprint) -> list[LinearSpec]:
    layers = range(blueprint.config.num_hidden_layers)
    return [spec(layer) for layer in layers for spec in (blueprint.qkv, blueprint.o)]
