"""The descriptions of mixers with a state of fixed size in place of keys and values.

D = hidden_size, V = value heads, v = their width, C = channels of queries, keys and values.
"""

from __future__ import annotations

import torch

from mixchat.engine.layers.model_tensors import ModelTensors
from mixchat.engine.layers.operations import (
    Apply,
    Convolve,
    DenseProduct,
    Operation,
    Product,
    Rows,
    UpdateState,
)
from mixchat.engine.layers.rope import RotaryEmbedding
from mixchat.kernels.cpu.convolution import Convolution
from mixchat.kernels.cpu.delta_net import DeltaNetShape, DeltaRule
from mixchat.kernels.cpu.gated_norm import GatedNorm
from mixchat.weights.format.blueprint import Blueprint


def delta_net(
    layer: int,
    used: Blueprint,
    tensors: ModelTensors,
    rope: RotaryEmbedding | None,
    x: Rows,
    out: Rows,
) -> list[Operation]:
    """Describe the gated DeltaNet or Mamba2 of a layer, from x [T, D] to `out` [T, D].

    In Mamba2 C, B and x take the places of queries, keys and values, and decays and rates depend on
    the same logits. `in_proj` gives queries, keys and values, and the gate of the output. `ba_proj`
    is [2V, D], for the logits of rates and decays, or [V, D] in Mamba2.
    """
    spec = used.mixer(layer)
    config = used.config
    own = {role: tensors.tensor(tensor) for role, tensor in spec.tensors.items()}
    is_mamba = config.mixer(layer) == "mamba"
    shape = DeltaNetShape(*(config.mamba_shape if is_mamba else config.delta_net_shape))
    size = shape.value_heads * shape.value_dim
    in_proj = spec.matrices["in_proj"]
    out_proj = spec.matrices["out_proj"]
    ba_proj = own["ba_proj"].contiguous()
    projected = Rows.new("projected", shape.channels + size)
    qkv = projected[: shape.channels]
    gate = projected[shape.channels :]
    convolved = Rows.new("convolved", shape.channels, dtype=torch.float32)
    ba = Rows.new("ba", len(ba_proj))
    read = Rows.new("read", size)
    normed = Rows.new("normed values", size)
    rule = DeltaRule(shape, own["A_log"], own["dt_bias"], own.get("D"))
    norm = GatedNorm(own["norm"].contiguous(), config.rms_norm_eps, config.mamba_n_groups or None)
    return [
        Product(projected, x, tensors.linear(in_proj), in_proj.name),
        DenseProduct(ba, x, ba_proj),
        Convolve(convolved, qkv, Convolution(own["conv1d"], own.get("conv1d_bias")), layer),
        UpdateState(read, convolved, ba, rule, layer),
        Apply(normed, (read, gate), norm),
        Product(out, normed, tensors.linear(out_proj), out_proj.name),
    ]


def short_convolution(
    layer: int,
    used: Blueprint,
    tensors: ModelTensors,
    rope: RotaryEmbedding | None,
    x: Rows,
    out: Rows,
) -> list[Operation]:
    """Describe a layer's convolution between two gates, from x [T, D] to `out` [T, D].

    `in_proj` gives both gates and the inputs.
    """
    spec = used.mixer(layer)
    hidden = used.config.hidden_size
    in_proj = spec.matrices["in_proj"]
    out_proj = spec.matrices["out_proj"]
    projected = Rows.new("projected", 3 * hidden)
    convolved = Rows.new("convolved", hidden)
    convolution = Convolution(tensors.tensor(spec.tensors["conv"]), gated=True)
    return [
        Product(projected, x, tensors.linear(in_proj), in_proj.name),
        Convolve(convolved, projected, convolution, layer),
        Product(out, convolved, tensors.linear(out_proj), out_proj.name),
    ]
