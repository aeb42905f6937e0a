"""The description of causal grouped-query attention.

H = num_attention_heads, G = num_key_value_heads, h = head_dim.
"""

from __future__ import annotations

import torch

from mixchat.engine.layers.model_tensors import LayerTensors
from mixchat.engine.layers.operations import (
    Apply,
    Attend,
    DenseProduct,
    Norm,
    Operation,
    RMSNorm,
    Rotate,
    Rows,
)
from mixchat.kernels.cpu.rows import Clamping, Gating, HeadGating


def attention(layer: LayerTensors, x: Rows, out: Rows) -> list[Operation]:
    """Describe the attention of a layer, from x [T, D] to `out` [T, D].

    Values may be the keys before their norm. A model with gates has one for each number of the
    attention's output, or for each head.
    """
    assert layer.rope is not None
    spec = layer.mixer
    config = layer.config
    heads, groups, width = config.attention_shape(layer.number)
    norms = [layer.norm(norm) for norm in spec.norms]
    first_value = heads if config.values_are_keys(layer.number) else heads + groups
    end = first_value + groups
    gates = heads if config.attn_output_gate else 0
    qkv = Rows.new("qkv", end + gates, width)
    head_gates = Rows.new("head gates", heads)
    queries = qkv[:heads]
    keys = qkv[heads : heads + groups]
    values = qkv[first_value:end]
    rotated = Rows.new("rotated", heads + groups, width)
    attended = Rows.new("attended", heads, width)

    steps: list[Operation] = [layer.mix(qkv, x, "qkv_proj")]
    if config.attn_head_gate:
        steps.append(DenseProduct(head_gates, x, layer.model.tensor(spec.tensors["g_proj"])))
    if config.v_norm:
        normed = Rows.new("normed values", groups, width)
        ones = RMSNorm(torch.ones_like(norms[1].weight), config.rms_norm_eps)
        steps.append(Norm(normed, values, ones))
        values = normed
    steps += [Norm(part, part, norm) for part, norm in zip((queries, keys), norms, strict=False)]
    if config.clip_qkv is not None:
        steps.append(Apply(qkv, (qkv,), Clamping(config.clip_qkv)))
    steps.append(Rotate(rotated, qkv[: heads + groups], layer.rope))
    sinks = None
    if config.attention_sinks:
        sinks = layer.model.tensor(spec.tensors["sinks"]).float()
    steps.append(Attend(attended, rotated[:heads], rotated[heads:], values, layer.number, sinks))
    if gates:
        steps.append(Apply(attended, (attended, qkv[end:]), Gating()))
    if config.attn_head_gate:
        steps.append(Apply(attended, (attended, head_gates), HeadGating(width)))
    return [*steps, layer.mix(out, attended, "o_proj")]
