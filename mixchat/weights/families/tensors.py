"""The tensors of a decoder, as most families name them in their checkpoints.

An installed model has q above k above v in one matrix, and an expert's gate (w1) above its up (w3).
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.family import Slice, Tensors

MoeTensors = Callable[[ModelConfig, str], Tensors]  # of a layer, whose prefix ends with a dot


def decoder_tensors(config: ModelConfig, moe: MoeTensors) -> Tensors:
    """Yield all tensors of a model whose layers have the routers and experts of `moe`."""
    norm, vocabulary = (config.hidden_size,), (config.vocab_size, config.hidden_size)
    embedding = "model.embed_tokens.weight"
    yield embedding, (Slice(embedding, vocabulary, factor=config.embedding_multiplier),)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield _same(f"{prefix}input_layernorm.weight", norm)
        yield _same(f"{prefix}post_attention_layernorm.weight", norm)
        yield from _attention(config, f"{prefix}self_attn.")
        yield from moe(config, prefix)
    yield _same("model.norm.weight", norm)
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    yield "lm_head.weight", (Slice(head, vocabulary, factor=1 / config.logits_scaling),)


def router(config: ModelConfig, prefix: str, name: str) -> Tensors:
    """Yield the matrix of a layer's router, which a checkpoint calls `name`, and its bias."""
    experts, installed = config.num_local_experts, f"{prefix}block_sparse_moe.gate"
    yield f"{installed}.weight", (Slice(f"{prefix}{name}.weight", (experts, config.hidden_size)),)
    if config.moe_bias:
        yield f"{installed}.bias", (Slice(f"{prefix}{name}.bias", (experts,)),)


def shared_expert(config: ModelConfig, prefix: str, name: str) -> Tensors:
    """Yield the matrices of a layer's dense part, which a checkpoint calls `name`, and its gate."""
    inner, hidden = config.shared_expert_intermediate_size, config.hidden_size
    own = f"{prefix}{name}"
    gate_up = (Slice(f"{own}.{x}_proj.weight", (inner, hidden)) for x in ("gate", "up"))
    yield f"{prefix}mlp.w13.weight", tuple(gate_up)
    yield f"{prefix}mlp.w2.weight", (Slice(f"{own}.down_proj.weight", (hidden, inner)),)
    if config.shared_expert_gate:
        yield f"{prefix}mlp.gate.weight", (Slice(f"{own}_gate.weight", (1, hidden)),)


def expert_prefix(prefix: str, expert: int) -> str:
    """Return the prefix of an installed expert's matrices w13 and w2."""
    return f"{prefix}block_sparse_moe.experts.{expert}."


def separate_experts(moe: str, gate: str, down: str, up: str) -> MoeTensors:
    """Describe experts whose three matrices are tensors of their own, and the router `moe`.gate."""

    def tensors(config: ModelConfig, prefix: str) -> Tensors:
        inner, hidden = config.intermediate_size, config.hidden_size
        yield from router(config, prefix, f"{moe}.gate")
        for expert in range(config.num_local_experts):
            own, installed = f"{prefix}{moe}.experts.{expert}.", expert_prefix(prefix, expert)
            gate_up = (Slice(f"{own}{name}.weight", (inner, hidden)) for name in (gate, up))
            yield f"{installed}w13.weight", tuple(gate_up)
            yield f"{installed}w2.weight", (Slice(f"{own}{down}.weight", (hidden, inner)),)

    return tensors


def _attention(config: ModelConfig, prefix: str) -> Tensors:
    hidden, columns = config.hidden_size, config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    scale, residual = config.attention_multiplier, config.residual_multiplier
    q_factor = 1 if scale is None else scale * sqrt(config.head_dim)  # the engine divides by sqrt
    rows = {"q": (columns, q_factor), "k": (key_value, 1), "v": (key_value, 1)}
    for kind, width in _parameters(config.attention_bias or config.qkv_bias, hidden):
        qkv = (
            Slice(f"{prefix}{x}_proj.{kind}", (count, *width), factor=factor)
            for x, (count, factor) in rows.items()
        )
        yield f"{prefix}qkv_proj.{kind}", tuple(qkv)
    for kind, width in _parameters(config.attention_bias, columns):
        name = f"{prefix}o_proj.{kind}"
        yield name, (Slice(name, (hidden, *width), factor=residual),)
    if config.qk_norm:
        widths = (columns, key_value) if config.qk_norm == "projection" else (config.head_dim,) * 2
        for x, count in zip("qk", widths, strict=True):
            yield _same(f"{prefix}{x}_norm.weight", (count,))
    if config.attention_sinks:
        yield _same(f"{prefix}sinks", (config.num_attention_heads,))


def _parameters(bias: bool, columns: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names of a linear map's parameters, and their shapes without the rows."""
    return [("weight", (columns,)), *([("bias", ())] if bias else [])]


def _same(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[Slice, ...]]:
    return name, (Slice(name, shape),)
