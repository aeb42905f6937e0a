"""The description of causal grouped-query attention.

H = num_attention_heads, G = num_key_value_heads, h = head_dim.
"""

from __future__ import annotations

import torch

from mixchat.engine.layers.model_tensors import ModelTensors
from mixchat.engine.layers.operations import (
    Apply,
    Attend,
    Norm,
    Operation,
    Product,
    RMSNorm,
    Rotate,
    Rows,
)
from mixchat.engine.layers.rope import RotaryEmbedding
from mixchat.kernels.cpu.rows import Clamping, Gating
from mixchat.weights.format.blueprint import Blueprint


def attention(
    layer: int,
    used: Blueprint,
    tensors: ModelTensors,
    rope: RotaryEmbedding | None,
    x: Rows,
    out: Rows,
) -> list[Operation]:
    """Describe the attention of a layer, from x [T, D] to `out` [T, D].

    Values may be the keys before their norm. A model with gates has one for each number of the
    attention's output.
    """
    assert rope is not None
    spec = used.mixer(layer)
    config = used.config
    heads, groups, width = config.attention_shape(layer)
    norms = [RMSNorm(tensors.tensor(norm), config.rms_norm_eps) for norm in spec.norms]
    first_value = heads if config.values_are_keys(layer) else heads + groups
    end = first_value + groups
    gates = heads if config.attn_output_gate else 0
    qkv = Rows.new("qkv", end + gates, width)
    queries = qkv[:heads]
    keys = qkv[heads : heads + groups]
    values = qkv[first_value:end]
    rotated = Rows.new("rotated", heads + groups, width)
    attended = Rows.new("attended", heads, width)

    steps: list[Operation] = [
        Product(qkv, x, tensors.linear(spec.matrices["qkv_proj"]), spec.matrices["qkv_proj"].name)
    ]
    if config.v_norm:
        normed = Rows.new("normed values", groups, width)
        ones = RMSNorm(torch.ones_like(norms[1].weight), config.rms_norm_eps)
        steps.append(Norm(normed, values, ones))
        values = normed
    steps += [Norm(part, part, norm) for part, norm in zip((queries, keys), norms, strict=False)]
    if config.clip_qkv is not None:
        steps.append(Apply(qkv, (qkv,), Clamping(config.clip_qkv)))
    steps.append(Rotate(rotated, qkv[: heads + groups], rope))
    sinks = tensors.tensor(spec.tensors["sinks"]).float() if config.attention_sinks else None
    steps.append(Attend(attended, rotated[:heads], rotated[heads:], values, layer, sinks))
    if gates:
        steps.append(Apply(attended, (attended, qkv[end:]), Gating()))
    o_proj = spec.matrices["o_proj"]
    return [*steps, Product(out, attended, tensors.linear(o_proj), o_proj.name)]
