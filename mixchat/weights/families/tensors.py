"""The tensors of a decoder, as most families name them in their checkpoints.

An installed model has q above k above v in one matrix, and an expert's gate (w1) above its up (w3).

E = experts, D = hidden_size, F = intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.family import Slice, Tensors

MoeTensors = Callable[[ModelConfig, str], Tensors]  # of a layer, whose prefix ends with a dot


def decoder_tensors(config: ModelConfig, moe: MoeTensors) -> Tensors:
    """Yield all tensors of a model whose layers have the routers and experts of `moe`."""
    norm, vocabulary = (config.hidden_size,), (config.vocab_size, config.hidden_size)
    yield _same("model.embed_tokens.weight", vocabulary)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield _same(f"{prefix}input_layernorm.weight", norm)
        yield _same(f"{prefix}post_attention_layernorm.weight", norm)
        yield from _attention(config, f"{prefix}self_attn.")
        yield from moe(config, prefix)
    yield _same("model.norm.weight", norm)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    yield "lm_head.weight", (Slice(head, vocabulary),)


def separate_experts(moe: str, gate: str, down: str, up: str) -> MoeTensors:
    """Describe a router `moe`.gate, and experts whose three matrices are tensors of their own."""

    def tensors(config: ModelConfig, prefix: str) -> Tensors:
        inner, hidden = config.intermediate_size, config.hidden_size
        router = Slice(f"{prefix}{moe}.gate.weight", (config.num_local_experts, hidden))
        yield f"{prefix}block_sparse_moe.gate.weight", (router,)
        for expert in range(config.num_local_experts):
            own = f"{prefix}{moe}.experts.{expert}."
            installed = f"{prefix}block_sparse_moe.experts.{expert}."
            up_and_gate = (Slice(f"{own}{name}.weight", (inner, hidden)) for name in (gate, up))
            yield f"{installed}w13.weight", tuple(up_and_gate)
            yield f"{installed}w2.weight", (Slice(f"{own}{down}.weight", (hidden, inner)),)

    return tensors


def _attention(config: ModelConfig, prefix: str) -> Tensors:
    hidden, columns = config.hidden_size, config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    rows = {"q": columns, "k": key_value, "v": key_value}
    qkv = (Slice(f"{prefix}{x}_proj.weight", (count, hidden)) for x, count in rows.items())
    yield f"{prefix}qkv_proj.weight", tuple(qkv)
    yield _same(f"{prefix}o_proj.weight", (hidden, columns))


def _same(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[Slice, ...]]:
    return name, (Slice(name, shape),)
