"""The form of a family's description, and the tensors that families have in common.

An installed model has q above k above v in one matrix, and an expert's gate (w1) above its up (w3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any, TypeAlias

from mixchat.base.model_config import ModelConfig


@dataclass(frozen=True)
class Slice:
    """Rows of a checkpoint's tensor, which is transposed first if need be, times `factor`.

    name: the tensor's name, or `X[3]` for the fourth part of a stacked tensor X.
    shape: the stored shape of the tensor or part.
    rows: the rows to take after a transposition, all if None.
    """

    name: str
    shape: tuple[int, ...]
    rows: range | None = None
    transposed: bool = False
    factor: float = 1.0

    @property
    def is_whole(self) -> bool:
        """Return whether the slice is the stored tensor without a change."""
        return self.rows is None and not self.transposed and self.factor == 1


Tensors: TypeAlias = Iterator[tuple[str, tuple[Slice, ...]]]
"""The name of each tensor of an installed model, and the slices above each other that make it."""


LayerTensors: TypeAlias = Callable[[ModelConfig, str], Tensors]
"""Yields tensors of a layer, whose prefix ends with a dot."""


@dataclass(frozen=True)
class Family:
    """A family of models, by config.json's `model_type`.

    read_config: reads a config.json. Raises `CheckpointError`.
    moe: yields the tensors of a layer's router, experts and dense part with their slices. Expert 3
    of layer 0 has `model.layers.0.block_sparse_moe.experts.3.w13.weight`, and `w2`. All other
    tensors are `decoder_tensors`.
    rotates_neighbours: a checkpoint's queries and keys have the two columns of a rotated pair side
    by side.
    """

    model_type: str
    read_config: Callable[[dict[str, Any]], ModelConfig]
    moe: LayerTensors
    rotates_neighbours: bool = False


def decoder_tensors(
    config: ModelConfig, moe: LayerTensors, *, rotates_neighbours: bool = False
) -> Tensors:
    """Yield all tensors of a model whose layers have the routers and experts of `moe`.

    Dense layers have the names of Llama's. rotates_neighbours: as in `Family`.
    """
    norm, vocabulary = (config.hidden_size,), (config.vocab_size, config.hidden_size)
    embedding = "model.embed_tokens.weight"
    yield embedding, (Slice(embedding, vocabulary, factor=config.embedding_multiplier),)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield _same(f"{prefix}input_layernorm.weight", norm)
        yield _same(f"{prefix}post_attention_layernorm.weight", norm)
        yield from _attention(config, f"{prefix}self_attn.", 2 if rotates_neighbours else 1)
        if layer >= config.first_k_dense_replace:
            yield from moe(config, prefix)
        else:
            yield from _mlp(config, prefix, "mlp", config.dense_intermediate_size)
    yield _same("model.norm.weight", norm)
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    yield "lm_head.weight", (Slice(head, vocabulary, factor=1 / config.logits_scaling),)


def router(config: ModelConfig, prefix: str, name: str) -> Tensors:
    """Yield the matrix of a layer's router, which a checkpoint calls `name`, and its bias."""
    experts, installed = config.num_local_experts, f"{prefix}block_sparse_moe.gate"
    yield f"{installed}.weight", (Slice(f"{prefix}{name}.weight", (experts, config.hidden_size)),)
    if config.moe_bias:
        yield f"{installed}.bias", (Slice(f"{prefix}{name}.bias", (experts,)),)
    if config.e_score_correction_bias:
        own = f"{name}.e_score_correction_bias"
        yield f"{installed}.e_score_correction_bias", (Slice(f"{prefix}{own}", (experts,)),)


def with_shared_expert(moe: LayerTensors, name: str) -> LayerTensors:
    """Describe `moe` and, if the model has it, the dense part that a checkpoint calls `name`."""

    def tensors(config: ModelConfig, prefix: str) -> Tensors:
        yield from moe(config, prefix)
        if config.shared_expert_intermediate_size:
            yield from _mlp(config, prefix, name, config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            gate = Slice(f"{prefix}{name}_gate.weight", (1, config.hidden_size))
            yield f"{prefix}mlp.gate.weight", (gate,)

    return tensors


def _mlp(config: ModelConfig, prefix: str, name: str, inner: int) -> Tensors:
    own, hidden = f"{prefix}{name}", config.hidden_size
    gate_up = (Slice(f"{own}.{x}_proj.weight", (inner, hidden)) for x in ("gate", "up"))
    yield f"{prefix}mlp.w13.weight", tuple(gate_up)
    yield f"{prefix}mlp.w2.weight", (Slice(f"{own}.down_proj.weight", (hidden, inner)),)


def expert_prefix(prefix: str, expert: int) -> str:
    """Return the prefix of an installed expert's matrices w13 and w2."""
    return f"{prefix}block_sparse_moe.experts.{expert}."


def separate_experts(moe: str, gate: str, down: str, up: str) -> LayerTensors:
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


def with_correction(moe: LayerTensors, name: str, *rows: int) -> LayerTensors:
    """Describe `moe` with a router's correction [*rows, E] that a checkpoint calls `name`."""

    def tensors(config: ModelConfig, prefix: str) -> Tensors:
        own = Slice(f"{prefix}{name}", (*rows, config.num_local_experts))
        for installed, slices in moe(config, prefix):
            is_correction = installed.endswith("e_score_correction_bias")
            yield installed, (own,) if is_correction else slices

    return tensors


MLP_EXPERTS = separate_experts("mlp", "gate_proj", "down_proj", "up_proj")
MLP_WITH_SHARED = with_shared_expert(MLP_EXPERTS, "mlp.shared_experts")


def _attention(config: ModelConfig, prefix: str, step: int) -> Tensors:
    hidden, columns = config.hidden_size, config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    scale, residual = config.attention_multiplier, config.residual_multiplier
    # Granite multiplies scores by a number of its own. The engine divides by the root.
    q_factor = 1 if scale is None else scale * sqrt(config.head_dim)
    parts = {"q": (columns, q_factor, step), "k": (key_value, 1, step), "v": (key_value, 1, 1)}
    for parameter, width in _parameters(config.attention_bias or config.qkv_bias, hidden):
        qkv = (
            Slice(f"{prefix}{x}_proj.{parameter}", (count, *width), rows, factor=factor)
            for x, (count, factor, step) in parts.items()
            for rows in _rows(count, config.head_dim, step)
        )
        yield f"{prefix}qkv_proj.{parameter}", tuple(qkv)
    for parameter, width in _parameters(config.attention_bias, columns):
        name = f"{prefix}o_proj.{parameter}"
        yield name, (Slice(name, (hidden, *width), factor=residual),)
    if config.qk_norm:
        # One norm over all heads of a projection (OLMoE), or a norm that all heads share (Qwen3).
        widths = (columns, key_value) if config.qk_norm == "projection" else (config.head_dim,) * 2
        for x, count in zip("qk", widths, strict=True):
            yield _same(f"{prefix}{x}_norm.weight", (count,))
    if config.attention_sinks:
        yield _same(f"{prefix}sinks", (config.num_attention_heads,))


def _rows(count: int, head_dim: int, step: int) -> list[range] | list[None]:
    """Return the rows in the order of an installed model, each `step`th one of a head first.

    With 4 rows in a head and a step of 2, the order is 0 2 1 3.
    """
    if step == 1:
        return [None]
    heads = range(0, count, head_dim)
    return [range(head + at, head + head_dim, step) for head in heads for at in range(step)]


def _parameters(bias: bool, columns: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names of a linear map's parameters, and their shapes without the rows."""
    return [("weight", (columns,)), *([("bias", ())] if bias else [])]


def _same(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[Slice, ...]]:
    return name, (Slice(name, shape),)
