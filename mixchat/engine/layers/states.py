"""The descriptions of mixers with a state of fixed size in place of keys and values.

D = hidden_size, V = value heads, v = their width, C = channels of queries, keys and values.
"""

from __future__ import annotations

import torch

from mixchat.engine.layers.model_tensors import LayerTensors
from mixchat.engine.layers.operations import (
    Apply,
    Convolve,
    DenseProduct,
    Operation,
    Rows,
    UpdateState,
)
from mixchat.kernels.cpu.convolution import Convolution
from mixchat.kernels.cpu.delta_net import DeltaNetShape, DeltaRule
from mixchat.kernels.cpu.gated_norm import GatedNorm


def delta_net(layer: LayerTensors, x: Rows, out: Rows) -> list[Operation]:
    """Describe the gated DeltaNet or Mamba2 of a layer, from x [T, D] to `out` [T, D].

    In Mamba2 C, B and x take the places of queries, keys and values, and decays and rates depend on
    the same logits. `in_proj` gives queries, keys and values, and the gate of the output. `ba_proj`
    is [2V, D], for the logits of rates and decays, or [V, D] in Mamba2.
    """
    config = layer.config
    tensors = {role: layer.model.tensor(spec) for role, spec in layer.mixer.tensors.items()}
    is_mamba = config.mixer(layer.number) == "mamba"
    shape = DeltaNetShape(*(config.mamba_shape if is_mamba else config.delta_net_shape))
    size = shape.value_heads * shape.value_dim
    ba_proj = tensors["ba_proj"].contiguous()
    projected = Rows.new("projected", shape.channels + size)
    qkv = projected[: shape.channels]
    gate = projected[shape.channels :]
    convolved = Rows.new("convolved", shape.channels, dtype=torch.float32)
    ba = Rows.new("ba", len(ba_proj))
    read = Rows.new("read", size)
    normed = Rows.new("normed values", size)
    rule = DeltaRule(shape, tensors["A_log"], tensors["dt_bias"], tensors.get("D"))
    groups = config.mamba_n_groups or None
    norm = GatedNorm(tensors["norm"].contiguous(), config.rms_norm_eps, groups)
    convolution = Convolution(tensors["conv1d"], tensors.get("conv1d_bias"))
    return [
        layer.mix(projected, x, "in_proj"),
        DenseProduct(ba, x, ba_proj),
        Convolve(convolved, qkv, convolution, layer.number),
        UpdateState(read, convolved, ba, rule, layer.number),
        Apply(normed, (read, gate), norm),
        layer.mix(out, normed, "out_proj"),
    ]


def short_convolution(layer: LayerTensors, x: Rows, out: Rows) -> list[Operation]:
    """Describe a layer's convolution between two gates, from x [T, D] to `out` [T, D].

    `in_proj` gives both gates and the inputs.
    """
    hidden = layer.config.hidden_size
    projected = Rows.new("projected", 3 * hidden)
    convolved = Rows.new("convolved", hidden)
    convolution = Convolution(layer.model.tensor(layer.mixer.tensors["conv"]), gated=True)
    return [
        layer.mix(projected, x, "in_proj"),
        Convolve(convolved, projected, convolution, layer.number),
        layer.mix(out, convolved, "out_proj"),
    ]
